"""Training runs: kills, full disks, folders that are taken or locked, leftovers, and what --overwrite may delete."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import RandomImages, cross_entropy, tiny_settings, tiny_trainer
from torch.utils.data import DataLoader

from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, new_folder
from norton_deploy.training.batches import Batch
from norton_deploy.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SETTINGS = {"batch_size": 4, "lr": 0.1, "seed": 0}


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A fresh interpreter that knows the tiny run; its output is read by the test."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'training'}"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit_and_leave_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.faults.kill_runs", "--kills", "4", "--out", str(tmp_path / "faults.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "faults.json").read_text())["cells"]["training run"]["kills"] >= 4


FILLED = """
    import resource, sys
    from pathlib import Path
    from tiny_run import cross_entropy, tiny_settings, tiny_trainer
    from norton_deploy.errors import UserError
    limit, step, calls = int(sys.argv[2]), int(sys.argv[3]), []
    def fill():  # from now on no file may grow beyond the limit: as on a full disk
        if len(calls) == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    def terms(model, batch):
        calls.append(1)
        fill()
        return cross_entropy(model, batch)
    try:
        trainer = tiny_trainer(tiny_settings(Path(sys.argv[1])), loss_terms=terms)
        fill()
        trainer.run()
    except UserError as error:
        print(error)
        sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "step", "file"), [(20_000, 7, "state.pt"), (1_000, 7, "log.jsonl or"), (10, 0, "log.jsonl or")]
)
def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on(tmp_path, limit, step, file):
    out = tmp_path / "run"
    process = python(FILLED, out, limit, step)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and not errors, errors
    [line] = said.splitlines()
    assert f"{out}/{file}" in line and "File too large" in line
    assert not list(out.glob(".*"))
    if step:
        assert torch.load(out / "state.pt", weights_only=True)["step"] == step - 1
    resumed = tiny_trainer(tiny_settings(out, resume=True))
    assert resumed.run().steps == 15
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["section"] == "train"] == list(range(1, 16))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_refuses_writing_in_the_middle_is_named(tmp_path):
    run, gone = tmp_path / "run", tmp_path / "gone"
    calls = []

    def lock(model, batch):
        calls.append(1)
        if len(calls) == 8:  # whoever is root may write into a read-only folder: a file in its place refuses everybody
            run.rename(gone)
            run.write_text("")
        return cross_entropy(model, batch)

    with pytest.raises(UserError, match=r"run/(log\.jsonl|state\.pt).* cannot"):
        tiny_trainer(tiny_settings(run), loss_terms=lock).run()
    run.unlink()
    gone.rename(run)
    assert tiny_trainer(tiny_settings(run, resume=True)).run().steps == 15


class KilledReader(RandomImages):
    """Reads in a process of its own, which is killed before batch 8 of all."""

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        loader = iter(DataLoader(list(super().batches(epoch, first_batch)), batch_size=None, num_workers=1))
        for index, batch in enumerate(loader):
            if len(self) * epoch + first_batch + index == 7:
                os.kill(loader._workers[0].pid, signal.SIGKILL)
                time.sleep(60)  # until torch's handler of the death breaks in
            yield batch


def test_a_process_that_reads_and_dies_ends_a_run_with_one_line_and_it_goes_on(tmp_path):
    trainer = tiny_trainer(tiny_settings(tmp_path / "run"))
    trainer.loader = KilledReader(4, 0, 1)
    with pytest.raises(UserError, match=r"a process that reads images died .*signal: Killed"):
        trainer.run()
    assert tiny_trainer(tiny_settings(tmp_path / "run", resume=True)).run().steps == 15


def test_a_second_run_is_kept_out_and_a_dead_one_is_not_in_the_way(tmp_path):
    hold = """
        import sys, time
        from pathlib import Path
        from norton_deploy.training.run_folder import RunFolder
        with RunFolder(Path(sys.argv[1])).held():
            print("held", flush=True)
            time.sleep(120)
    """
    process = python(hold, tmp_path)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on .* trains here"), RunFolder(tmp_path).held():
            pass
    finally:
        process.kill()
        process.communicate()
    with RunFolder(tmp_path).held():
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(SETTINGS, resume=False, overwrite=False)
    mine = [tmp_path / "run" / f".{name}.k3j_x9ab.partial" for name in ("state.pt", "last.safetensors", "log.jsonl")]
    theirs = [tmp_path / "run" / name for name in (".state.pt.swp", ".state.pt.partial", ".notes.k3j_x9ab.partial")]
    for path in (*mine, *theirs):
        path.write_text("")
    folder.claim(SETTINGS, resume=True, overwrite=False)
    assert not any(path.exists() for path in mine) and all(path.exists() for path in theirs)
    with atomic_write(tmp_path / "file") as stream:
        [partial] = tmp_path.glob(".file.*")
        assert partial.name.endswith(".partial")  # what is looked for is what is written
        stream.write(b"")


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    folder, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    folder.claim(SETTINGS, resume=False, overwrite=False)
    folder.tensorboard.mkdir()
    events, notes = folder.tensorboard / "events.out.tfevents.1", folder.tensorboard / "notes.txt"
    own = folder.root / "results.txt"
    for path in (events, notes, own, folder.log):
        path.write_text("")
    folder.claim(SETTINGS, resume=False, overwrite=True)
    assert notes.exists() and own.exists() and not events.exists() and not folder.log.exists()
    notes.unlink()
    folder.tensorboard.rmdir()
    elsewhere.mkdir()
    (elsewhere / events.name).write_text("")
    folder.tensorboard.symlink_to(elsewhere)
    folder.claim(SETTINGS, resume=False, overwrite=True)
    assert (elsewhere / events.name).exists() and not folder.tensorboard.is_symlink()


@pytest.mark.parametrize("settings", [None, "{}", "[1]", "no JSON", '{"editor.fontSize": 12}'])
def test_a_folder_of_somebody_elses_is_not_overwritten(tmp_path, settings):
    log = tmp_path / "log.jsonl"
    log.write_text("mine")
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    with pytest.raises(UserError, match=r"log\.jsonl: is in the way|settings\.json"):
        RunFolder(tmp_path).claim(SETTINGS, resume=False, overwrite=True)
    assert log.read_text() == "mine"


def test_an_evaluation_that_is_made_again_stands_in_the_log_once(tmp_path):
    trainer = tiny_trainer(tiny_settings(tmp_path / "run"))
    saves = []

    def dies(path, model):  # after the log's line of the last evaluation, before the state knows of it
        saves.append(path)
        if trainer.step == 15:
            raise KeyboardInterrupt

    trainer.save_model = dies
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    torch.save(state | {"step": 15, "epoch": 2, "batch": 3}, tmp_path / "run" / "state.pt")
    tiny_trainer(tiny_settings(tmp_path / "run", resume=True)).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["section"] == "evaluation"].count(15) == 1


def test_a_state_that_lacks_a_field_is_named(tmp_path):
    tiny_trainer(tiny_settings(tmp_path / "run")).run()
    path = tmp_path / "run" / "state.pt"
    state = torch.load(path, weights_only=True)
    for broken in (
        {**state, "model": {}},
        {**state, "optimizer": {"state": 3}},
        {"format": 2},
        {**state, "unknown": 1},
    ):
        torch.save(broken, path)
        with pytest.raises(UserError, match=r"state\.pt: (not a whole state|state format)"):
            tiny_trainer(tiny_settings(tmp_path / "run", resume=True)).run()


def test_a_folder_of_somebody_elses_partial_name_stays(tmp_path):
    theirs, left = tmp_path / ".data.partial", tmp_path / ".data.k3j_x9ab.partial"
    for folder in (theirs, left):
        folder.mkdir()
        (folder / "a").write_text("")
    with new_folder(tmp_path / "data") as folder:
        (folder / "b").write_text("")
    assert (theirs / "a").exists() and not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.partial", "data"]

import json
import signal

import pytest
import torch
from tiny_run import cross_entropy, tiny_settings, tiny_trainer

from norton_deploy.errors import UserError
from norton_deploy.training.batches import Batch
from norton_deploy.training.run_folder import check_identity
from norton_deploy.training.trainer import Evaluation


class KilledError(Exception):
    """Stands in for SIGKILL: nothing runs after it that could save anything."""


def all_tensors(trainer):
    state = {"model": trainer.bare_model.state_dict()}
    state["momentum"] = {
        str(key): entry["momentum_buffer"] for key, entry in trainer.optimizer.state_dict()["state"].items()
    }
    return {f"{part}.{name}": tensor for part, entries in state.items() for name, tensor in entries.items()}


def assert_identical(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = tiny_trainer(tiny_settings(tmp_path_factory.mktemp("whole") / "run"))
    result = trainer.run()
    return all_tensors(trainer), result


# an epoch has 6 steps, the state is saved at steps 4, 6 (end of epoch), 8, 12, 15
@pytest.mark.parametrize("death", [0, 1, 3, 4, 5, 6, 7, 11, 12, 14])
def test_death_in_any_step_leaves_no_trace(tmp_path, uninterrupted, death):
    def dies(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        dies.calls += 1
        if dies.calls == death + 1:
            raise KilledError
        return cross_entropy(model, batch)

    dies.calls = 0
    with pytest.raises(KilledError):
        tiny_trainer(tiny_settings(tmp_path / "run"), loss_terms=dies).run()
    trainer = tiny_trainer(tiny_settings(tmp_path / "run", resume=True))
    result = trainer.run()
    assert_identical(all_tensors(trainer), uninterrupted[0])
    assert result == uninterrupted[1]
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["section"] == "train"] == list(range(1, 16))


@pytest.mark.parametrize("death", [1, 2, 3])
def test_death_in_an_evaluation_leaves_no_trace(tmp_path, uninterrupted, death):
    def dies(model: torch.nn.Module) -> Evaluation:
        dies.calls += 1
        if dies.calls == death:
            raise KilledError
        total = sum(float(parameter.abs().sum()) for parameter in model.parameters())
        return Evaluation({"weights": {"sum": total}}, -total)

    dies.calls = 0
    with pytest.raises(KilledError):
        tiny_trainer(tiny_settings(tmp_path / "run"), evaluate=dies).run()
    trainer = tiny_trainer(tiny_settings(tmp_path / "run", resume=True))
    assert trainer.run() == uninterrupted[1]
    assert_identical(all_tensors(trainer), uninterrupted[0])


def test_another_setting_is_named(tmp_path):
    tiny_trainer(tiny_settings(tmp_path / "run")).run()
    with pytest.raises(UserError, match=r"'lr' was 0\.05 and is now 0\.1"):
        tiny_trainer(tiny_settings(tmp_path / "run", resume=True, lr=0.1)).run()


def test_another_setting_is_named_before_there_is_a_state(tmp_path):
    tiny_trainer(tiny_settings(tmp_path / "run"))
    with pytest.raises(UserError, match=r"settings\.json: .*'lr' was 0\.05 and is now 0\.1"):
        tiny_trainer(tiny_settings(tmp_path / "run", resume=True, lr=0.1))


def test_only_the_setting_that_differs_is_named(tmp_path):
    before = {"detector": {"min_size": 192, "channels": (1, 2)}}
    check_identity(tmp_path, before, {"detector": {"min_size": 192, "channels": [1, 2]}})
    with pytest.raises(UserError, match=r"'detector\.min_size' was 192 and is now 200; "):
        check_identity(tmp_path, before, {"detector": {"min_size": 200, "channels": [1, 2]}})


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_its_step(tmp_path, uninterrupted, stop):
    def interrupted(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        interrupted.calls += 1
        if interrupted.calls == 2:
            signal.raise_signal(stop)
        return cross_entropy(model, batch)

    interrupted.calls = 0
    before = signal.getsignal(stop)
    trainer = tiny_trainer(tiny_settings(tmp_path / "run"), loss_terms=interrupted)
    said: list[str] = []
    trainer.announce = said.append
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(stop) == before
    assert said == ["stopped after step 2; its state is saved, --resume goes on from there"]
    resumed = tiny_trainer(tiny_settings(tmp_path / "run", resume=True))
    resumed.announce = said.append
    assert resumed.run() == uninterrupted[1]
    assert said[1].startswith("continues at step 2 (")
    assert_identical(all_tensors(resumed), uninterrupted[0])


def test_a_run_is_never_mixed_with_another(tmp_path):
    tiny_trainer(tiny_settings(tmp_path / "run")).run()
    with pytest.raises(UserError, match="--resume"):
        tiny_trainer(tiny_settings(tmp_path / "run"))
    tiny_trainer(tiny_settings(tmp_path / "run", overwrite=True))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        tiny_trainer(tiny_settings(tmp_path / "run", resume=True))


def test_a_broken_state_is_named(tmp_path):
    tiny_trainer(tiny_settings(tmp_path / "run")).run()
    (tmp_path / "run" / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"state\.pt"):
        tiny_trainer(tiny_settings(tmp_path / "run", resume=True)).run()


def test_a_finished_run_stays_as_it_is(tmp_path, uninterrupted):
    tiny_trainer(tiny_settings(tmp_path / "run")).run()
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert tiny_trainer(tiny_settings(tmp_path / "run", resume=True)).run() == uninterrupted[1]
    assert (tmp_path / "run" / "log.jsonl").read_text() == log

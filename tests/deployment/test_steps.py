"""Steps are done once, repeated where their files are gone, and never with other settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from norton_deploy.deployment.measurement import model_record
from norton_deploy.deployment.steps import ProgressLines, Steps, in_words
from norton_deploy.errors import UserError


def steps(folder: Path, said: list[str], settings: dict[str, Any] | None = None) -> Steps:
    return Steps(folder, settings or {"speedup": 4}, count=2, report=said.append, clock=iter(range(100)).__next__)


def test_a_step_is_done_once_until_its_file_is_gone(tmp_path: Path) -> None:
    done: list[str] = []
    file = tmp_path / "run" / "plan.yaml"

    def work() -> dict[str, Any]:
        done.append("plan")
        file.parent.mkdir(exist_ok=True)
        file.touch()
        return {"macs": 7}

    for expected in (1, 1):
        said: list[str] = []
        found = steps(tmp_path / "run", said).run("plan", "a plan", "tools/plan.py", work, seconds=40, products=[file])
        assert (found, len(done)) == ({"macs": 7}, expected)
    assert said == ["[1/2] a plan: done already"]
    file.unlink()
    said = []
    again = steps(tmp_path / "run", said)
    again.run("plan", "a plan", "tools/plan.py", work, seconds=40, products=[file])
    assert len(done) == 2
    assert said == ["[1/2] a plan: about 40 s\n    $ tools/plan.py", "    took 1 s"]
    record = again.records[0]
    assert (record.title, record.command, record.seconds) == ("a plan", "tools/plan.py", 1)


def test_an_interrupted_step_leaves_nothing_and_the_others_stay(tmp_path: Path) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    first = steps(tmp_path / "run", [])
    first.run("one", "one", "tools/one.py", dict, seconds=1)
    with pytest.raises(KeyboardInterrupt):
        first.run("two", "two", "tools/two.py", interrupted, seconds=1)
    assert list(json.loads((tmp_path / "run" / "deploy.json").read_text())["cells"]) == ["one"]


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    steps(tmp_path / "run", []).run("one", "one", "tools/one.py", dict, seconds=1)
    with pytest.raises(UserError, match=r"speedup = 4, now it is 3; choose another --out"):
        steps(tmp_path / "run", [], {"speedup": 3})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(UserError, match="foreign: holds something that is no deployment"):
        steps(tmp_path / "foreign", [])
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "deploy.lock").touch()
    steps(tmp_path / "locked", [])


def test_estimates_and_progress_in_words() -> None:
    assert [in_words(seconds) for seconds in (1, 44, 100, 3000, 9000)] == [
        "about 5 s", "about 45 s", "about 2 min", "about 50 min", "about 2.5 h",
    ]  # fmt: skip
    said: list[str] = []
    progress = ProgressLines(said.append, every_s=0)
    for done in (1, 2):
        progress("refit", done, 4)
    progress("look at images", 1, 0)
    assert said == ["    refit: 1 of 4", "    refit: 2 of 4, about 5 s left", "    look at images: 1"]


def test_a_timed_model_is_said_to_run_where_it_was_timed(tmp_path):
    model = tmp_path / "dense.onnx"
    model.write_bytes(b"graph")
    score = {"runs_on": "ONNX Runtime, 1 thread", "scores": {}}
    latency = {"samples": 3, "mean_ms": 2.0, "p50_ms": 2.0, "p90_ms": 2.0, "p99_ms": 2.0, "spread": 0.1, "fps": 500.0}
    timed = {**latency, "stages_ms": {}, "detections": 1.0}
    timing = {"latency": {"dense": timed}, "runs_on": {"dense": "ONNX Runtime, 2 threads"}}
    assert model_record("dense", model, tmp_path, score, timing, "dense").runs_on == "ONNX Runtime, 2 threads"
    assert model_record("small", model, tmp_path, score, timing, "small").runs_on == "ONNX Runtime, 1 thread"
    assert model_record("small", model, tmp_path, None, None).runs_on == "not run here"

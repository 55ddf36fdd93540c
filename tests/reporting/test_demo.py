"""The demo at its smallest: every step runs, is not repeated, and the report shows what was asked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from norton_deploy.commands.demo import FIXED_S, SMALL_SHARE, Settings, StepTimes, fitted, main
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.deployment import Deployment

SMALL = ("--train-images", "8", "--val-images", "4", "--pretrain-steps", "2", "--finetune-steps", "1",
         "--detector-steps", "2")  # fmt: skip


def test_as_many_detector_steps_as_the_minutes_allow(capsys: pytest.CaptureFixture[str]) -> None:
    slow, settings = (
        StepTimes(1.0, 2.0),
        Settings(pretrain_steps=160, finetune_steps=60, detector_steps=450, minutes=15),
    )
    left = 15 * 60 - FIXED_S - 160 - SMALL_SHARE * 60
    steps = fitted(settings, slow).detector_steps
    assert left - 10 * 2 * (1 + SMALL_SHARE) < steps * 2 * (1 + SMALL_SHARE) <= left
    said = capsys.readouterr().out
    assert "1.00 s a pretraining step, 2.00 s a detector step: about 15 min with" in said and "allows 450" in said
    assert fitted(settings, StepTimes(0.2, 0.4)).detector_steps == 450
    assert capsys.readouterr().out.strip().endswith("about 9 min")
    assert fitted(replace(settings, detector_steps=2), slow).detector_steps == 2


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_resnets")
def test_the_demo_runs_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    out, plan = tmp_path / "demo", tmp_path / "plan.yaml"
    CompressionPlan("resnet50", {"layer3.1.conv2": 1}, {"layer3.1.conv1": 40, "layer2": 96}).save(plan)
    arguments = ["--out", str(out), "--plan", str(plan), *SMALL]
    assert main(arguments) == 0
    assert (out / "report.md").read_text().count("pictures/1-dense.jpg") == 1
    report = Deployment.from_json(out / "report.json")
    assert (report.dense.name, report.small.name, report.images, len(report.steps)) == ("dense", "NORTON", 4, 7)
    assert report.dense.macs and report.small.macs and report.small.macs < report.dense.macs
    assert all(step.title and step.command for step in report.steps) and report.compared and report.training
    times = json.loads((out / "times.json").read_text())
    assert times["classifier"] > 0 and times["detector"] > 0 and not (out / "probe").exists()
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == made

"""The demo at its smallest: every step runs, is not repeated, and the report shows what was asked for."""

from pathlib import Path

import pytest

from norton_deploy.commands.demo import main
from norton_deploy.reporting.deployment import Deployment

SMALL = ("--train-images", "8", "--val-images", "4", "--pretrain-steps", "2", "--finetune-steps", "1",
         "--detector-steps", "2")  # fmt: skip


@pytest.mark.slow
def test_the_demo_runs_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    out = tmp_path / "demo"
    assert main(["--out", str(out), *SMALL]) == 0
    assert (out / "report.md").read_text().count("pictures/1-dense.jpg") == 1
    report = Deployment.from_json(out / "report.json")
    assert (report.dense.name, report.small.name, report.images, len(report.steps)) == ("dense", "NORTON", 4, 7)
    assert report.dense.macs and report.small.macs and report.small.macs < report.dense.macs
    assert all(step.title and step.command for step in report.steps) and report.compared and report.training
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main(["--out", str(out), *SMALL]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == made

"""The demo at its smallest: every step runs, is not repeated, and the report shows what was asked for."""

import json
from pathlib import Path

import pytest

from norton_deploy.commands.demo import main
from norton_deploy.inference import loading as weights

SMALL = ("--train-images", "8", "--val-images", "4", "--pretrain-steps", "2", "--finetune-steps", "1",
         "--detector-steps", "2")  # fmt: skip


@pytest.mark.slow
def test_the_demo_runs_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    out = tmp_path / "demo"
    monkeypatch.setattr(weights, "PACKAGED_FOLDER", tmp_path)  # an installation without weights
    assert main(["--out", str(out), *SMALL]) == 0
    report = (out / "report.md").read_text()
    assert report.count("pictures/detections-") >= 1 and "packaged" not in report
    record = json.loads((out / "report.json").read_text())
    assert record["metrics"].keys() == {"dense", "NORTON"} and record["held_out_images"] == 4
    assert record["complexity"]["NORTON"]["macs"] < record["complexity"]["dense"]["macs"]
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (tmp_path / "fast_mask.safetensors").write_bytes((out / "detector-norton" / "last.safetensors").read_bytes())
    assert main(["--out", str(out), *SMALL]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == made
    assert "pictures/packaged-" in (out / "report.md").read_text()

"""What a deployment's report holds, and the page that shows it."""

import json
from pathlib import Path

import pytest

from norton_deploy.cost.turns import Speedup
from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import OVERLAP_METRICS, CategoryScore, MeasureScore
from norton_deploy.reporting.deployment import ComparedImage, Deployment, ModelRecord, StepRecord
from norton_deploy.reporting.deployment_report import write_report
from norton_deploy.reporting.latency import LatencySummary

HOSTILE = "<script>alert('a|b')</script> $x_"


def record(name: str, ap: float, ms: float) -> ModelRecord:
    curve = tuple(round(max(0.0, 1 - step / 100 / ap / 2), 4) for step in range(101))
    categories = (
        CategoryScore(1, "cup", 30, ap + 0.1, 0.9, curve),
        CategoryScore(2, HOSTILE, 12, ap - 0.1, 0.5, curve),
        CategoryScore(3, "nothing", 0, None, None),
    )
    measure = MeasureScore(dict.fromkeys(OVERLAP_METRICS, ap), categories, {"0.50": curve, "0.75": curve})
    stages = {"decode_ms": 2.0, "preprocess_ms": 3.0, "copy_ms": 0.0, "infer_ms": ms - 6, "postprocess_ms": 1.0}
    latency = LatencySummary(40, ms, ms, ms * 1.1, ms * 1.2, 0.05, 1e3 / ms, stages, 7.0)
    return ModelRecord(
        name=name, file=f"{name}.onnx", runs_on="ONNX Runtime, CPU", macs=1e9 * ms, params=1e6 * ms,
        file_bytes=int(1e6 * ms), scores={"bbox": measure}, latency=latency,
    )  # fmt: skip


def deployment(**values: object) -> Deployment:
    known = {
        "title": f"Deployment of {HOSTILE}", "task": "box", "data": "scenes", "images": 20,
        "dense": record("dense", 0.5, 80.0), "small": record("NORTON", 0.45, 20.0),
        "provenance": {"command": "norton deploy", "versions": {"python": "3.11"}},
        "speedup": Speedup(4.0, 3.8, 4.2, 40), "artefact": "artefact/model.onnx", "budget": "speedup=4",
        "steps": (StepRecord("check the data", "norton check-data --data D", 1.5),), "notes": ("A quick run.",),
    }  # fmt: skip
    return Deployment(**known | values)


def test_a_report_comes_back_from_its_json(tmp_path: Path) -> None:
    made = deployment(compared=(ComparedImage("1.jpg", 3, 2, 1, "a.jpg", "b.jpg", "c.jpg"),))
    (tmp_path / "report.json").write_text(made.to_json())
    assert Deployment.from_json(tmp_path / "report.json") == made
    known = json.loads(made.to_json())
    assert (known["ap_dense"], known["ap_small"], known["artefact"]) == (0.5, 0.45, "artefact/model.onnx")
    assert known["speedup"]["low"] == 3.8 and "95 % interval" in known["speedup"]["verdict"]
    for text, message in (("{", "not a deployment"), ('{"title": "t"}', "'task' is missing"), ('{"x": 1}', "'x'")):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(UserError, match=message):
            Deployment.from_json(tmp_path / "report.json")


def test_what_was_not_measured_is_left_out_and_says_so(tmp_path: Path) -> None:
    bare = ModelRecord(name="a", file="a.onnx", runs_on="here")
    page = write_report(tmp_path, deployment(dense=bare, small=bare, speedup=None, steps=(), notes=())).read_text()
    assert "was not timed" in page and "unknown box AP (not measured)" in page
    assert json.loads((tmp_path / "report.json").read_text())["ap_small"] is None

"""What a deployment's report holds, and the page that shows it."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from norton_deploy.cost.turns import Speedup
from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import OVERLAP_METRICS, CategoryScore, MeasureScore
from norton_deploy.reporting.charts import draw_categories, draw_training
from norton_deploy.reporting.deployment import ComparedImage, Deployment, ModelRecord, StepRecord
from norton_deploy.reporting.deployment_report import first_figures, verdict, write_report
from norton_deploy.reporting.latency import LatencySummary
from norton_deploy.reporting.report import Paragraph

HOSTILE = "<script>alert('a|b')</script> $x_"


def record(name: str, ap: float, ms: float) -> ModelRecord:
    curve = tuple(round(max(0.0, 1 - step / 100 / ap / 2), 4) for step in range(101))
    categories = (
        CategoryScore(1, "cup", 30, ap + 0.1),
        CategoryScore(2, HOSTILE, 12, ap - 0.1),
        CategoryScore(3, "nothing", 0, None),
    )
    measure = MeasureScore(dict.fromkeys(OVERLAP_METRICS, ap), categories, {"0.50": curve, "0.75": curve})
    stages = {"decode_ms": 2.0, "preprocess_ms": 3.0, "copy_ms": 0.0, "infer_ms": ms - 6, "postprocess_ms": 1.0}
    latency = LatencySummary(40, ms, ms, ms * 1.1, ms * 1.2, 0.05, 1e3 / ms, stages, 7.0, 1.2e3 / ms)
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


def test_equal_models_show_no_losses(tmp_path: Path) -> None:
    files = ["a.jpg", "b.jpg", "c.jpg"]
    for name in files:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for found, differ in ((2, False), (1, True)):
        made = deployment(compared=(ComparedImage("1.jpg", 3, 2, found, *files),))
        page = write_report(tmp_path, made).read_text()
        assert ("largest losses" in page, "both models find equally many" in page) == (differ, not differ)


def test_dots_at_the_ends_of_the_scale_are_whole(tmp_path: Path) -> None:
    ends = [
        (CategoryScore(number, "cup", 3, ap), CategoryScore(number, "cup", 3, ap))
        for number, ap in ((1, 0.0), (2, 1.0))
    ]
    draw_categories(tmp_path / "c.svg", ends, ("dense", "small"))
    assert re.search(r"<use ", drawn := (tmp_path / "c.svg").read_text())
    assert not re.search(r"clip-path[^>]*>\s*<use ", drawn)


def test_a_short_training_has_whole_steps_and_no_mean_of_one_entry(tmp_path: Path) -> None:
    for count in (3, 30):
        draw_training(
            tmp_path / "l.svg", [{"step": step, "losses": {"total": 1.0}} for step in range(10, 10 * count + 1, 10)]
        )
        drawn = (tmp_path / "l.svg").read_text()
        assert ("mean of" in drawn) == (count == 30) and ">12.5<" not in drawn


def test_an_option_in_a_note_stays_in_its_line() -> None:
    assert Paragraph("(--quick) a-b -- c").to_html() == "<p>(<span>--quick</span>) a-b -- c</p>"


def test_what_was_not_measured_is_left_out_and_says_so(tmp_path: Path) -> None:
    bare = ModelRecord(name="a", file="a.onnx", runs_on="here")
    page = write_report(tmp_path, deployment(dense=bare, small=bare, speedup=None, steps=(), notes=())).read_text()
    assert "was not timed" in page and "unknown box AP (not measured)" in page
    assert json.loads((tmp_path / "report.json").read_text())["ap_small"] is None


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.5, 0.45, "loses 0.050 of 0.500 box AP (90.0 % kept, 20 images)"),
        (0.5, 0.5001, "keeps the box AP of 0.500 unchanged (20 images)"),
        (0.1016, 0.10046, "loses 0.002 of 0.102 box AP (98.9 % kept, 20 images)"),
        (0.5, 0.52, "gains 0.020 box AP over 0.500 (20 images)"),
        (0.0, 0.0, "has a box AP of 0.000 where dense has 0.000, which says nothing about losses (20 images)"),
        (0.004, 0.001, "has a box AP of 0.001 where dense has 0.004, which says nothing about losses (20 images)"),
    ],
)
def test_the_verdict_on_accuracy(before: float, after: float, words: str) -> None:
    known = {name: record(name, 0.5, 9.0) for name in ("dense", "NORTON")}
    for model, ap in zip(known.values(), (before, after), strict=True):
        model.scores["bbox"].metrics.update(AP=ap)
    made = deployment(dense=known["dense"], small=known["NORTON"])
    assert words in verdict(made)
    assert ("±0.000" in first_figures(made)[1][2]) == (round(before, 3) == round(after, 3))


def test_a_missed_budget_stands_in_the_verdict() -> None:
    assert ", not the 5 times asked for (95 %" in verdict(deployment(asked=5.0))
    for asked in (None, 4.1):  # 4.1 lies within the interval
        assert "asked for" not in verdict(deployment(asked=asked))


@pytest.mark.parametrize(
    ("speedup", "words"),
    [
        (Speedup(2.0, 1.9, 2.1, 12), "NORTON is 2.00 times as fast as dense (95 % interval 1.90 to 2.10"),
        (Speedup(1.1, 0.9, 1.3, 12), "NORTON is not shown to be faster than dense (1.10 times, 95 %"),
        (Speedup(0.8, 0.7, 0.9, 12), "NORTON is slower than dense, 0.80 times as fast (95 %"),
        (Speedup(2.0, 1.9, 2.1, 5), "NORTON is not shown to be faster than dense (2.00 times, 95 %"),
    ],
)
def test_the_verdict_on_speed(speedup: Speedup, words: str) -> None:
    said = verdict(deployment(speedup=speedup))
    assert said.startswith(words) and (", too few to tell, " in said) == (speedup.pairs == 5)

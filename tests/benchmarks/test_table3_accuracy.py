import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import table3_accuracy
from benchmarks.lib.cells import ResultCells
from benchmarks.lib.table3_accuracy_report import accuracy_table
from benchmarks.table3_accuracy import SHARED, Cell, Experiment, Settings, report
from norton_deploy.checkpoints.checkpoint import Checkpoint, read_header
from norton_deploy.compression.compress import apply_structure
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings


def cell(seed: int, model: str, steps: int, ap: float, weight: float | None = None, lr: float = 0.001) -> dict:
    macs = 1e9 if model == "fast" else 4e9
    return {
        "task": "box", "seed": seed, "model": model, "finetune_steps": steps, "steps": steps or 12,
        "finetune_lr": lr if steps else None, "distillation_weight": weight, "precision": "no",
        "images": 500, "metrics": {"bbox": {"AP": ap, "AP50": 2 * ap, "AR100": ap + 0.1}},
        "macs": macs, "params": macs / 100,
    }  # fmt: skip


CELLS = (
    cell(0, "dense before", 0, 0.36),
    cell(0, "fast", 6, 0.3),
    cell(0, "fast", 6, 0.38, 0.5),
    cell(0, "dense", 6, 0.4),
    cell(0, "dense", 6, 0.2, lr=0.01),
    cell(1, "dense", 6, 0.5),
    cell(1, "fast", 6, 0.45),
    cell(0, "fast", 12, 0.36),
)
LATENCY = {
    "dense": {"latency": {"fps": 10.0}},
    "fast": {"latency": {"fps": 31.0}, "speedup": {"ratio": 3.1, "low": 3.0, "high": 3.2}},
}
RESULTS = {
    "settings": {"train_images": 40, "pretrain_steps": 9, "recovery": "both"},
    "cells": {**{str(index): entry for index, entry in enumerate(CELLS)}, "latency, box": {"models": LATENCY}},
}


def text_of(results: dict, path: Path) -> str:
    path.write_text(json.dumps(results))
    return report(ResultCells(path, results["settings"], report))


def test_retention_is_taken_seed_by_seed_at_equal_steps() -> None:
    before, dense, worse, fast, distilled, longer, *paper = accuracy_table(CELLS, LATENCY, "box").rows
    assert before[:4] == ("dense before", "- (trained for 12)", "-", "-") and before[7] == "-"
    assert dense[:8] == ("dense", "6 steps", "0.001", "-", "0.450 (0.400, 0.500)", "0.900 (0.800, 1.000)",
                         "0.550 (0.500, 0.600)", "1.00 (1.00, 1.00)")  # fmt: skip
    assert worse[2] == "0.01" and worse[7] == "0.50"  # the better learning rate is what counts
    assert fast[7:] == ("0.82 (0.75, 0.90)", "1.00G (75)", "10.00M (75)", "31.0", "3.10 (3.00 to 3.20)")
    assert distilled[1:4] == ("6 steps", "0.001", "0.5") and distilled[7] == "0.95"  # one seed so far
    assert longer[1] == "12 steps" and longer[7] == "-"  # no dense one with as many steps
    assert [row[7] for row in paper] == ["1.00", "0.86"]  # 0.32 / 0.37


def test_retention_is_of_the_dense_detector_before_where_its_fine_tuning_harms_it() -> None:
    harmed = [cell(0, "dense before", 0, 0.5), *CELLS[1:]]
    before, dense, _, fast, *_ = accuracy_table(harmed, LATENCY, "box").rows
    assert before[7] == "-" and dense[7] == "0.90 (0.80, 1.00)" and fast[7] == "0.75 (0.60, 0.90)"


def test_what_a_plan_keeps_without_fine_tuning_is_of_the_dense_detector_before() -> None:
    before, recovered, *_ = accuracy_table([cell(0, "fast", 0, 0.27), *CELLS], LATENCY, "box").rows
    assert before[1] == "- (trained for 12)" and before[7] == "-"
    assert recovered[:4] == ("fast", "none", "-", "-") and recovered[7] == "0.75"  # 0.27 / 0.36


def test_models_of_one_size_stand_by_name() -> None:
    alike = [cell(0, f"plan {letter}", 6, 0.3) for letter in "ecabd"]
    rows = accuracy_table([*alike, cell(0, "plan", 6, 0.3)], {}, "box").rows
    assert [row[0] for row in rows[:6]] == ["plan", "plan a", "plan b", "plan c", "plan d", "plan e"]


def test_what_was_imitated_is_said() -> None:
    heads = {**cell(0, "fast", 6, 0.39, 0.5), "distill": "heads"}
    both = {**cell(0, "fast", 6, 0.395, 0.5), "distill": "both"}
    other = {**cell(0, "fast", 6, 0.39, 0.5), "distill": "both", "teacher": "dense before"}
    rows = accuracy_table([*CELLS, heads, both, other], LATENCY, "box").rows
    assert [row[3] for row in rows if row[:3] == ("fast", "6 steps", "0.001")] == [
        "-",
        "0.5",
        "0.5 and heads",
        "0.5 and heads, by dense before",
        "heads",
    ]


def test_other_tasks_have_a_column_for_their_boxes() -> None:
    cell = {**CELLS[0], "task": "mask"}
    cell["metrics"] = {"bbox": cell["metrics"]["bbox"], "segm": {**cell["metrics"]["bbox"], "AP": 0.125}}
    table = accuracy_table([cell], {}, "mask")
    assert table.header[7] == "Box AP / AP50"
    assert table.rows[0][4] == "0.125" and table.rows[0][7].startswith(f"{cell['metrics']['bbox']['AP']:.3f} / ")
    assert {len(row) for row in table.rows} == {len(table.header)}


def test_the_report_holds_the_tasks_that_were_measured(tmp_path) -> None:
    text = text_of(RESULTS, tmp_path / "results.json")
    assert "## FasterRCNN" in text and "MaskRCNN" not in text
    assert "40 training images; 9 steps of 32 crops; training" in text
    assert "precision of the training: float32." in text


def test_a_seed_of_another_precision_is_named(tmp_path) -> None:
    cells = {str(index): {**one, "precision": "bf16" if one["seed"] else "no"} for index, one in enumerate(CELLS)}
    text = text_of({**RESULTS, "cells": cells}, tmp_path / "results.json")
    assert "precision of the training: float32; FasterRCNN with seed 1 mixed with bfloat16." in text


def test_a_seed_of_a_task_has_one_precision(tmp_path: Path) -> None:
    settings = Settings(precision="bf16", out=tmp_path / "results.json", work=tmp_path)
    shared = {name: getattr(settings, name) for name in SHARED}
    settings.out.write_text(json.dumps({**RESULTS, "settings": shared}))
    with pytest.raises(UserError, match=r"results\.json: its cell '0' was trained with another precision than bf16"):
        Experiment(settings).run_task("box", 0, tmp_path / "pretrain")


@pytest.mark.parametrize(("before", "after", "teacher"), [(0.3, 0.4, "dense"), (0.4, 0.3, "dense before")])
def test_the_better_dense_detector_teaches(tmp_path, monkeypatch, before, after, teacher) -> None:
    taught = {}

    def record(experiment: Experiment, cell: Cell, out: Path, init: Path, teacher: Path | None = None) -> None:
        taught[out.name] = (cell.teacher, teacher and teacher.parent.name)
        ap = {"dense before": before, "dense": after}.get(cell.model, 0.1)
        experiment.results.cells[experiment.name_of(out)] = {"metrics": {"bbox": {"AP": ap, "AR100": ap}}}

    monkeypatch.setattr(Experiment, "detector", record)
    monkeypatch.setattr(Experiment, "compress", lambda *_: None)
    monkeypatch.setattr(Experiment, "recovered", lambda *_: None)
    settings = Settings(plans=("fast",), finetune_steps=6, out=tmp_path / "results.json", work=tmp_path)
    Experiment(settings).run_task("box", 0, tmp_path / "pretrain")
    folder = {"dense": "box-dense-6-lr-0.0015", "dense before": "box-trained"}[teacher]
    assert taught.pop("box-fast-6-lr-0.0015-distilled-0.5") == (teacher, folder)
    assert set(taught.values()) == {(None, None)} and len(taught) == 3


def test_filters_may_be_chosen_in_another_way_than_the_plan_says(tmp_path, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(table3_accuracy, "load_checkpoint", lambda path: path)
    monkeypatch.setattr(table3_accuracy, "compress_narrow", lambda *_, **given: told.append(given["choose"]) or dense)
    monkeypatch.setattr(table3_accuracy, "save_checkpoint", lambda *_: None)
    dense = Checkpoint(None, None)  # type: ignore[arg-type]
    for choose, name in ((None, "table3"), ("harm", "table3-harm")):
        experiment = Experiment(Settings(choose=choose, out=tmp_path / "results.json", work=tmp_path))
        experiment.compress(tmp_path / "dense", "table3", tmp_path / "small.safetensors")
        assert told.pop() == choose and experiment.compressed("table3") == name


def with_the_structure(dense: Checkpoint, source: Path, plan: CompressionPlan, images: Path, **_: object) -> Checkpoint:
    """Stands in for `compress_narrow`: random weights, in no time."""
    return Checkpoint(apply_structure(dense.model, plan), dense.header.made_by("test", source, plan=plan))


@pytest.mark.slow
def test_full_width_is_torchvisions_and_what_is_done_stays(tmp_path, monkeypatch) -> None:
    settings = Settings(
        tasks=("box",), plans=("table3",), seeds=(0,), train_images=24, val_images=2, pretrain_steps=1,
        detector_steps=1, finetune_steps=1, full_width=64, batch_size=2, workers=0, device="cpu", sampled_rois=16,
        recovery="none", distillation_weights=(), latency_rounds=0, out=tmp_path / "full.json", work=tmp_path / "work",
    )  # fmt: skip
    monkeypatch.setattr(table3_accuracy, "compress_narrow", with_the_structure)
    assert table3_accuracy.main(settings) == 0
    found = json.loads((tmp_path / "full.json").read_text())
    assert found["settings"]["full_width"] == 64 and found["settings"]["batch_size"] == 2
    assert "64 px; training and fine-tuning in steps of 2 images, 16 sampled" in (tmp_path / "full.md").read_text()
    dense, small = (found["cells"][f"seed0/box-{name}-1-lr-0.0015"] for name in ("dense", "table3"))
    trained = tmp_path / "work/full_width64-batch_size2-sampled_rois16/seed0/box-trained"
    header = read_header(trained / "last.safetensors").detector
    assert header.roi == replace(DetectorSettings().roi, canonical_scale=18, batch_per_image=16)
    assert header.rpn == replace(DetectorSettings().rpn, anchor_sizes=(3, 5, 10, 20, 41))
    recovered = found["cells"]["seed0/box-table3-start"]
    assert (recovered["steps"], recovered["finetune_lr"], recovered["images"]) == (0, None, 2)
    assert dense["params"] > 41e6 > small["params"] == recovered["params"]
    monkeypatch.setattr(table3_accuracy, "train_once", lambda settings: {"steps": 0, "metrics": {}})
    monkeypatch.setattr(table3_accuracy, "load_checkpoint", lambda path: pytest.fail(f"{path} was measured again"))
    assert table3_accuracy.main(settings) == 0

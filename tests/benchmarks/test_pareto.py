import pytest

from benchmarks import distillation, pareto, pareto_precision
from benchmarks.lib.cells import ResultCells
from benchmarks.lib.cpu_forms import FP32
from norton_deploy.errors import UserError

TUNING = {"steps": 9, "lr": 0.1, "precision": "no", "distill": "both"}


def ap(value: float) -> dict:
    return {"images": 4, "metrics": {"segm": {"AP": value}}}


def plan(speedup: float, harm: float, value: float) -> dict:
    measured = {"measured_speedup": speedup, "measured_speedup_p10_p90": [1.0, 5.0], "prediction_error": 0.1}
    return {**measured, "predicted_harm": harm, "measured_harm": 2 * harm, **ap(value)}


def results(path, report, cells: dict, settings: dict | None = None) -> ResultCells:
    found = ResultCells(path, settings or {}, report)
    found.add(cells)
    return found


def test_fine_tuned_plans_stand_beside_the_dense_detector_that_was_trained_on(tmp_path):
    cells = {
        "dense": ap(0.4), "mixed at 2": plan(2, 0.1, 0.38), "NORTON at 3": plan(3, 0.3, 0.3),
        "NORTON at 4": plan(4, 0.2, 0.2), "coupled at 9": {"impossible": "too small"},
        "dense, fine-tuned": {"tuning": TUNING, **ap(0.5)}, "mixed at 2, fine-tuned": {"tuning": TUNING, **ap(0.45)},
    }  # fmt: skip
    text = pareto.report(results(tmp_path / "pareto.json", pareto.report, cells))
    assert "| 0.380 (0.95) | 0.450 (0.90) |" in text and "| 0.200 (0.50) | - |" in text
    assert "dense: segm AP 0.400; dense after 9 steps: segm AP 0.500" in text
    assert "predicted harm and lost segm AP, refitted, 3 plans: 0.50." in text  # 1 2 3 against 1 3 2
    assert "after 9 steps, " not in text  # one plan has no order
    assert "Not possible with what is considered: coupled at 9." in text
    assert (tmp_path / "pareto.png").stat().st_size > 1000


def test_plans_that_were_fine_tuned_otherwise_are_not_compared(tmp_path):
    cells = {
        "dense": ap(0.4), "dense, fine-tuned": {"tuning": TUNING, **ap(0.5)},
        "mixed at 2": plan(2, 0.1, 0.38), "mixed at 2, fine-tuned": {"tuning": {**TUNING, "steps": 8}, **ap(0.5)},
    }  # fmt: skip
    with pytest.raises(UserError, match="by different recipes"):
        pareto.report(results(tmp_path / "pareto.json", pareto.report, cells))


def test_imitations_are_compared_with_the_control_of_their_seed(tmp_path):
    def run(what: str, seed: int, value: float) -> dict:
        return {"imitated": what, "seed": seed, **ap(value)}

    cells = {
        "teacher": ap(0.5), "start": ap(0.3), "0": run("nothing", 0, 0.4), "1": run("nothing", 1, 0.42),
        "2": run("both", 0, 0.41), "3": run("both", 1, 0.45), "4": run("heads", 2, 0.4),
    }  # fmt: skip
    text = distillation.report(results(tmp_path / "d.json", distillation.report, cells, {"task": "mask", "steps": 9}))
    assert "| both | 2 | 0.4300 | +0.0200 (+0.0100, +0.0300) |" in text
    assert "| heads | 1 | 0.4000 | - |" in text and "start: segm AP 0.3000" in text


def test_precisions_are_compared_with_the_dense_detector_in_fp32(tmp_path):
    forms = list(pareto_precision.ALL_FORMS)
    sizes = {"fp32": 4e6, "fp16": 2e6, "int8": 1e6}
    cells = {
        name: {"image_size": [64, 96], "AP": {form: {"segm": value} for form in forms}, "bytes": sizes}
        for name, value in (("dense", 0.5), ("small", 0.45))
    }
    every = [f"{name}, {form}" for name in cells for form in forms]
    ratios = {name: {"ratio": 2.0, "low": 1.5, "high": 2.5} for name in every if name != f"dense, {FP32}"}
    times = {"cpu": "vnni", "baseline": "dense", "p50_ms": dict.fromkeys(every, 3.0), "speedup": ratios}
    settings = {"val_images": 4}
    found = results(tmp_path / "p.json", pareto_precision.report, {**cells, "times": times}, settings)
    text = pareto_precision.report(found)
    assert f"| dense | {FP32} | 3.0 | 1 | 0.5000 (1.000) | 4.0 |" in text
    assert "| small | int8, OpenVINO | 3.0 | 2.00 (1.50 to 2.50) | 0.4500 (0.900) | 1.0 |" in text
    assert (tmp_path / "p.png").stat().st_size > 1000
    alone = results(tmp_path / "q.json", pareto_precision.report, cells, settings)
    assert "times are not" in pareto_precision.report(alone)

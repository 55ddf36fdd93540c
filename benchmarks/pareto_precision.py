"""What speed costs in each precision: AP kept against measured speed-up, for plans in fp32, fp16, bf16 and int8.

A dense detector and compressed ones of it, all trained, are exported in each precision. AP and time are those of the
same files, at the detectors' own image size: AP on the val split, time in turn with all others. fp16 is what TensorRT
takes; CPUs have no arithmetic for it and convert it back and forth, so its times say nothing about a GPU.

    python benchmarks/pareto_precision.py --data runs/data --models runs/pareto/dense-trained/last.safetensors \
        runs/pareto/mixed-2-trained/last.safetensors runs/pareto/mixed-4-trained/last.safetensors
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.cells import RESULTS, Cell, ResultCells, interval, page, run, settings_of, tabulate
from benchmarks.lib.cpu_forms import FORMS, FP32, Form, opened, write_graphs
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.image_folder import find_images
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_detector
from norton_deploy.export.contract import Precision
from norton_deploy.export.quantise import cpu_of_this_machine
from norton_deploy.files import sha256_of
from norton_deploy.parity.export_checked import ExportOptions, export_checked
from norton_deploy.reporting.charts import DENSE, STAGE_COLOURS, chart, legend_above
from norton_deploy.reporting.latency import measure_alternating

ALL_FORMS: dict[str, Form] = {**FORMS, "fp16, ONNX Runtime": ("fp16", "onnxruntime", None)}
TIMES = "times"
COLOURS = (DENSE, *STAGE_COLOURS)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of benchmarks/pareto_precision.py."""

    models: tuple[Path, ...]
    """Trained detectors (.safetensors) named by their folders; the first is the dense one."""
    data: Path
    """Dataset in COCO's layout; train calibrates, val is evaluated on."""
    calibration_images: int = 64
    """Training images that the ranges of int8 are taken from."""
    val_images: int = 200
    """Evaluate on the first so many images of val."""
    rounds: int = 40
    """Measured calls of each form of each detector."""
    work: Path = Path("runs/pareto_precision")
    """Folder for the graphs."""
    out: Path = RESULTS / "pareto_precision.json"
    """Results; a table (.md) and a picture (.png) are written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    settings.work.mkdir(parents=True, exist_ok=True)
    names = {model.parent.name: model for model in settings.models}
    if len(names) < len(settings.models):
        raise UserError("--models: two of them are in folders of the same name, by which they are told apart")
    digests = {name: sha256_of(model) for name, model in names.items()}
    results = ResultCells(settings.out, {**settings_of(settings, "models", "data"), "sha256": digests}, report)
    for name, model in names.items():
        results.measure(name, partial(measure_ap, settings, model, name))
    results.measure(TIMES, partial(measure_times, settings, tuple(names)))
    return results.measure_all({})


def graph_of(settings: Settings, name: str, precision: Precision) -> Path:
    """Where the graph of a detector is."""
    return settings.work / f"{name}_{precision}.onnx"


def measure_ap(settings: Settings, model: Path, name: str) -> Cell:
    """AP of every form of a detector, each from its own file."""
    options = ExportOptions(
        calibration=str(settings.data / "train2017"), calibration_images=settings.calibration_images
    )
    graphs = write_graphs(model, settings.work / name, options)
    half = graph_of(settings, name, "fp16")
    export_checked(graphs.model, graphs.task, graphs.categories, half, replace(options, precision="fp16"))
    dataset = CocoDetection(settings.data, "val", graphs.task, categories=graphs.categories)
    scores = {}
    for form_name, form in ALL_FORMS.items():
        predictor = opened(graph_of(settings, name, form[0]), form)
        found = evaluate_detector(predictor, dataset, limit=settings.val_images, progress=False)
        scores[form_name] = {kind: float(values["AP"]) for kind, values in found.metrics.items()}
    precisions = dict.fromkeys(form[0] for form in ALL_FORMS.values())
    sizes = {precision: graph_of(settings, name, precision).stat().st_size for precision in precisions}
    return {"image_size": list(graphs.contract.image_size), "AP": scores, "bytes": sizes}


def measure_times(settings: Settings, names: tuple[str, ...]) -> Cell:
    """One image at a time, every form of every detector in turn."""
    predictors = {
        f"{name}, {form_name}": opened(graph_of(settings, name, form[0]), form)
        for name in names
        for form_name, form in ALL_FORMS.items()
    }
    images = find_images(settings.data / "val2017")[:8]
    ledger = measure_alternating(predictors, images, rounds=settings.rounds)
    baseline = f"{names[0]}, {FP32}"
    return {
        "cpu": cpu_of_this_machine(),
        "baseline": names[0],
        "p50_ms": {name: ledger.summary(name).p50_ms for name in predictors},
        "speedup": {name: ledger.speedup(baseline, name).to_dict() for name in predictors if name != baseline},
        "times_ms": ledger.to_dict(),
    }


def report(results: ResultCells) -> str:
    """A row per detector and form, and the picture."""
    cells = {name: cell for name, cell in results.cells.items() if name != TIMES}
    if TIMES not in results.cells:
        return page(f"AP of {', '.join(cells)} is measured, times are not.")
    times = results.cells[TIMES]
    kind = list(cells[times["baseline"]]["AP"][FP32])[-1]
    draw(results.path.with_suffix(".png"), cells, times, kind)
    whole = cells[times["baseline"]]["AP"][FP32][kind]
    rows = [(name, form) for name in cells for form in ALL_FORMS]

    def speedup(row: tuple[str, str]) -> str:
        found = times["speedup"].get(", ".join(row))
        return interval(found) if found else "1"

    columns: dict[str, Callable[[tuple[str, str]], str]] = {
        "Detector": lambda row: row[0],
        "Precision, engine": lambda row: row[1],
        "Median, ms": lambda row: f"{times['p50_ms'][', '.join(row)]:.1f}",
        "Speed-up (95 % interval)": speedup,
        f"{kind} AP (kept)": lambda row: "{:.4f} ({:.3f})".format(
            cells[row[0]]["AP"][row[1]][kind], cells[row[0]]["AP"][row[1]][kind] / whole
        ),
        "MB": lambda row: f"{cells[row[0]]['bytes'][ALL_FORMS[row[1]][0]] / 1e6:.1f}",
    }
    height, width = cells[times["baseline"]]["image_size"]
    caption = (
        f"Plans by precision: {results.settings['val_images']} val images, {height} x {width} pixels, {times['cpu']}; "
        f"speed-up over {times['baseline']} in {FP32}"
    )
    return page(tabulate(caption, rows, columns))


def draw(path: Path, cells: Mapping[str, Cell], times: Mapping[str, Any], kind: str) -> None:
    """Share of AP kept against speed-up, a line per precision and engine."""
    whole = cells[times["baseline"]]["AP"][FP32][kind]
    with chart(path, 4.2) as axes:
        for form, colour, mark in zip(ALL_FORMS, COLOURS, "osDv^X", strict=True):
            points = [
                (times["speedup"].get(f"{name}, {form}", {"ratio": 1.0})["ratio"], cell["AP"][form][kind] / whole)
                for name, cell in cells.items()
            ]
            axes.plot(*zip(*sorted(points), strict=True), f"-{mark}", color=colour, linewidth=1, label=form)
        axes.set_xlabel(f"Speed-up over dense in {FP32}")
        axes.set_ylabel(f"Share of {kind} AP kept")
        axes.set_ylim(0, 1.1)
        legend_above(axes, columns=2)


if __name__ == "__main__":
    run(Settings, main)

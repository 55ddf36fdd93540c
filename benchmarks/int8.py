"""8 bits and a second CPU engine: dense and `fast` in fp32, bf16 and int8, in ONNX Runtime and OpenVINO.

Times are of detectors with random weights that do equal work, every form of a task in turn; sizes are of the same
files. AP is that of the detectors that come with the package, on drawn scenes that they never saw: of each form the
very file that is evaluated, calibrated on other scenes, and what the parity gate finds. There is no packaged dense
detector and none for boxes alone. Other checkpoints can be evaluated beside them (`--checkpoints`).

int8 with bf16 for what is left in float is not among the forms: OpenVINO 2026.4 cannot compile `fast` so.

`--prepare` makes the graphs and measures nothing, so that the timing itself is short. A finished cell is written at
once; running again does only what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from benchmarks.lib.cells import RESULTS, Cell, ResultCells, interval, page, run, settings_of, tabulate
from benchmarks.lib.cpu_forms import FORMS, FP32, opened, write_graphs
from benchmarks.lib.openvino_nodes import costliest_nodes, nodes_tables
from benchmarks.lib.random_detectors import RandomDetectors, WorkSettings, timing_table
from benchmarks.lib.stages import split_stages
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.image_file import read_image
from norton_deploy.data.synthetic import draw_scene, write_dataset
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_detector
from norton_deploy.export.equalise import equalised
from norton_deploy.export.onnx_export import read_contract
from norton_deploy.export.quantise import calibrate, cpu_of_this_machine, write_quantised
from norton_deploy.export.quantise_sensitivity import HeadErrors
from norton_deploy.inference.loading import PACKAGED_TASKS, PackagedTask, packaged_detector
from norton_deploy.inference.predictor import Predictor
from norton_deploy.parity.checked_quantisation import SYNTHETIC
from norton_deploy.parity.export_checked import ExportOptions
from norton_deploy.parity.gate import check_parity
from norton_deploy.parity.report import BF16
from norton_deploy.reporting.latency import measure_alternating
from norton_deploy.search.latency_budget import export_tuned
from norton_deploy.structures import TASKS, Task

MODELS = ("dense", "fast")
BASELINE = f"dense, {FP32}"
WORST = 8
DATA_SEED, GATE_SEED = 20_000, 30_000
TOLERANCES_OF_FORM = {"bf16, OpenVINO": BF16}


@dataclass(frozen=True, kw_only=True)
class Settings(WorkSettings):
    """Settings of benchmarks/int8.py."""

    tasks: tuple[Task, ...] = TASKS
    """Which random detectors to time."""
    packaged: tuple[PackagedTask, ...] = PACKAGED_TASKS
    """Which packaged detectors to evaluate."""
    checkpoints: tuple[Path, ...] = ()
    """More detectors to evaluate as the packaged ones, for example tuned by `train_det --quantise`."""
    forms: tuple[str, ...] = tuple(FORMS)
    """In which forms; bf16 needs a CPU that has it."""
    prepare: bool = False
    """Make the graphs only."""
    rounds: int = 6
    """Measured calls of each form."""
    warm_up: int = 1
    """Calls before measuring."""
    calibration: int = 8
    """Images that ranges are taken from."""
    eval_images: int = 100
    """Drawn scenes that AP is measured on."""
    gate_images: int = 16
    """Drawn scenes that the parity gate compares detections on."""
    out: Path = RESULTS / "int8.json"
    """Results; a .md is written beside it."""
    work: Path = Path("runs/int8")
    """Folder for graphs and images; graphs that are there are taken as they are."""


def main(settings: Settings) -> int:
    """Make or measure what is missing."""
    unknown = sorted(set(settings.forms) - set(FORMS))
    if unknown:
        raise UserError(f"--forms: no {', '.join(unknown)}; there are {', '.join(FORMS)}")
    models = RandomDetectors()
    if settings.prepare:
        for task in settings.tasks:
            for plan in MODELS:
                prepare(task, plan, settings, models)
        return 0
    cells: dict[str, Callable[[], dict[str, Any]]] = {}
    for task in settings.tasks:
        cells[f"time {task}"] = partial(measure_times, task, settings, models)
        cells[f"stages {task}"] = partial(measure_stages, task, settings, models)
        cells[f"nodes {task}"] = partial(measure_nodes, task, settings, models)
    for packaged in settings.packaged:
        cells[f"AP packaged {packaged}"] = partial(measure_ap, packaged_detector(packaged), settings)
    for checkpoint in settings.checkpoints:
        cells[f"AP {checkpoint.stem}"] = partial(measure_ap, checkpoint, settings)
    key = settings_of(settings, "tasks", "packaged", "checkpoints", "forms", "prepare")
    return ResultCells(settings.out, key, report).measure_all(cells)


def prepare(task: Task, plan: str, settings: Settings, models: RandomDetectors) -> dict[str, Path]:
    """Precision -> graph of a random detector, made if it is not there."""
    files = {precision: settings.work / f"{task}_{plan}_{precision}.onnx" for precision in ("fp32", "int8")}
    images, _ = settings.prepare_images(settings.work)
    if not files["fp32"].exists():
        print(f"{task}: exporting {plan}", file=sys.stderr)
        model, categories = models.get(task, plan, settings, images)
        export_tuned(model, settings.workload, categories, timing_table(settings.work), files["fp32"])
    if not files["int8"].exists():
        print(f"{task}: quantising {plan}", file=sys.stderr)
        batches = [read_image(path)[None] for path in images[: settings.calibration]]
        graph = equalised(onnx.load(files["fp32"]), batches)
        ranges = calibrate(graph, batches)
        contract = read_contract(files["fp32"])
        write_quantised(graph, contract, files["int8"], ranges, cpu=cpu_of_this_machine())
    return files


def measure_times(task: Task, settings: Settings, models: RandomDetectors) -> dict[str, Any]:
    """Every form of both plans, all in turn, and the files' sizes."""
    images, images_are = settings.prepare_images(settings.work)
    predictors: dict[str, Predictor] = {}
    sizes: dict[str, int] = {}
    for plan in MODELS:
        files = prepare(task, plan, settings, models)
        sizes |= {f"{plan}, {precision}": file.stat().st_size for precision, file in files.items()}
        for name, form in FORMS.items():
            predictors[f"{plan}, {name}"] = opened(files[form[0]], form)
    ledger = measure_alternating(predictors, images, rounds=settings.rounds, warm_up=settings.warm_up)
    return {
        "images": images_are,
        "cpu": cpu_of_this_machine(),
        "bytes": sizes,
        "devices": {name: predictor.device for name, predictor in predictors.items()},
        "p50_ms": {name: ledger.summary(name).p50_ms for name in predictors},
        "times_ms": ledger.to_dict(),
        "speedup": {name: ledger.speedup(BASELINE, name).to_dict() for name in predictors if name != BASELINE},
    }


def measure_nodes(task: Task, settings: Settings, models: RandomDetectors) -> dict[str, Any]:
    """Where OpenVINO's time of the compressed detector goes in 8 bits."""
    images, _ = settings.prepare_images(settings.work)
    file = prepare(task, MODELS[-1], settings, models)["int8"]
    return costliest_nodes(file, [read_image(path) for path in images], settings.rounds)


def measure_stages(task: Task, settings: Settings, models: RandomDetectors) -> dict[str, Any]:
    """Where the time of the compressed detector goes in each form, by the engines' own profilers."""
    images, _ = settings.prepare_images(settings.work)
    files = prepare(task, MODELS[-1], settings, models)
    forms = {
        name: split_stages(opened(files[form[0]], form), images, calls=settings.rounds) for name, form in FORMS.items()
    }
    return {"stages_ms": {name: split.stages_ms for name, split in forms.items()}}


def measure_ap(checkpoint_file: Path, settings: Settings) -> dict[str, Any]:
    """AP of every form of a trained detector, each from its own file, and what the gate says of it."""
    data = settings.work / f"coco_{settings.eval_images}"
    if not data.exists():
        write_dataset(data, 1, settings.eval_images, seed=DATA_SEED)
    graphs = write_graphs(
        checkpoint_file, settings.work / f"{checkpoint_file.parent.name}_{checkpoint_file.stem}",
        ExportOptions(calibration=SYNTHETIC, calibration_images=64),
    )  # fmt: skip
    dataset = CocoDetection(data, "val", graphs.task, categories=graphs.categories)
    scenes = [draw_scene(GATE_SEED + index, graphs.contract.image_size).image for index in range(settings.gate_images)]
    scores, gate = {}, {}
    for name in settings.forms:
        form = FORMS[name]
        precision = form[0]
        predictor = opened(graphs.files[precision], form)
        metrics = evaluate_detector(predictor, dataset, progress=False).metrics
        scores[name] = {measure: float(values["AP"]) for measure, values in metrics.items()}
        parity = check_parity(
            graphs.model, graphs.files[precision], scenes, precision=precision, predictor=predictor,
            tolerances=TOLERANCES_OF_FORM.get(name),
        )  # fmt: skip
        gate[name] = [stage for stage in parity.to_dict()["stages"] if stage["limit"] is not None]
    errors = HeadErrors(graphs.calibrated, graphs.ranges, graphs.batches[:2], symmetric=False)
    return {
        "images": settings.eval_images,
        "AP": scores,
        "gate": gate,
        "head_errors": errors.by_head(errors.layers),
        "layer_errors": errors.each(),
        "bytes": {precision: file.stat().st_size for precision, file in graphs.files.items()},
    }


def report(results: ResultCells) -> str:
    """Times, sizes and AP as Markdown."""
    parts: list[Any] = []
    for name, cell in results.cells.items():
        if name.startswith("time "):
            parts.append(times_table(name, cell))
        elif name.startswith("stages "):
            parts.append(stages_table(name, cell))
        elif name.startswith("nodes "):
            parts += nodes_tables(name, cell)
        else:
            parts += [ap_table(name, cell), gate_table(name, cell), layers_table(name, cell)]
    return page(*parts)


def times_table(name: str, cell: Cell) -> Any:
    """One line a form."""
    caption = f"{name}: random weights, {cell['cpu']}, {cell['images']}"
    return tabulate(
        caption,
        cell["p50_ms"],
        {
            "form": str,
            "median, ms": lambda form: f"{cell['p50_ms'][form]:.0f}",
            f"times as fast as {BASELINE}": lambda form: (
                interval(cell["speedup"][form]) if form in cell["speedup"] else "1"
            ),
            "MB": lambda form: f"{cell['bytes'][', '.join(file_of(form))] / 1e6:.1f}",
        },
    )


def stages_table(name: str, cell: Cell) -> Any:
    """One line a form, one column a stage."""
    columns: dict[str, Callable[[str], str]] = {"form": str}
    for stage in next(iter(cell["stages_ms"].values())):
        columns[f"{stage}, ms"] = lambda form, stage=stage: f"{cell['stages_ms'][form][stage]:.0f}"  # type: ignore[misc]  # the default binds it
    return tabulate(f"{name}: `{MODELS[-1]}`, mean of profiled calls", cell["stages_ms"], columns)


def file_of(form: str) -> tuple[str, str]:
    """ "fast, bf16, OpenVINO" -> the plan and the precision of the file that it ran."""
    plan, _, rest = form.partition(", ")
    return plan, FORMS[rest][0]


def ap_table(name: str, cell: Cell) -> Any:
    """One line a form."""
    measures = list(next(iter(cell["AP"].values())))
    columns: dict[str, Callable[[str], str]] = {"form": str}
    for measure in measures:
        columns[f"{measure} AP"] = lambda form, measure=measure: f"{cell['AP'][form][measure]:.4f}"  # type: ignore[misc]  # the default binds it
    columns["MB"] = lambda form: f"{cell['bytes'][FORMS[form][0]] / 1e6:.1f}"
    return tabulate(f"{name}: on {cell['images']} drawn scenes", cell["AP"], columns)


def gate_table(name: str, cell: Cell) -> Any:
    """What the parity gate found of each form, the detections' measures."""
    rows = [
        (form, stage)
        for form, stages in cell["gate"].items()
        for stage in stages
        if stage["name"] == "final"
        or not stage["passed"]
        or (form.startswith("int8, ONNX") and "root" in stage["measure"])
    ]
    columns: dict[str, Callable[[tuple[str, Cell]], str]] = {
        "form": lambda row: row[0],
        "stage": lambda row: row[1]["name"],
        "measure": lambda row: row[1]["measure"],
        "worst": lambda row: f"{row[1]['worst']:.3g}",
        "limit": lambda row: f"{row[1]['limit']:g}",
        "passed": lambda row: "yes" if row[1]["passed"] else "NO",
    }
    return tabulate(f"{name}: the parity gate", rows, columns)


def layers_table(name: str, cell: Cell) -> Any:
    """The layers that suffer most, each in 8 bits alone."""
    worst = list(cell["layer_errors"].items())[:WORST]
    everything = max(cell["head_errors"].values())
    return tabulate(
        f"{name}: error at the heads' outputs of the {WORST} worst layers alone (all together: {everything:.3f})",
        worst,
        {"layer": lambda row: row[0], "relative root mean square": lambda row: f"{row[1]:.4f}"},
    )


if __name__ == "__main__":
    run(Settings, main)

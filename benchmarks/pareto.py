"""What speed costs: AP kept against measured speed-up, for plans of one form each and for plans that mix all forms.

A trained dense detector is planned for several speed-ups of ONNX Runtime on this machine: by pruning alone, with the
filters' own CPD (the paper's form), coupled filters, Tucker-2, or whatever is best for each layer. Every plan prunes as
well, by harm. It is compressed, refitted on unlabelled images and evaluated. The uniform plans of configs/plans, whose
filters are chosen by angles as in the paper, are made, refitted and timed beside them. Times are those of the search,
the plan and the dense detector in turn. With --finetune-steps all of them, and the dense detector too, are then trained
for so many steps, the plans' with the dense one as teacher. How well the planner's harm orders the plans by AP is
stated as a rank correlation. A finished plan is not made again.

    python benchmarks/pareto.py --model runs/mask/last.safetensors --data runs/data
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, page, run, settings_of, tabulate
from benchmarks.lib.detector_tuning import Precision, average_precision, finetuned, task_of
from benchmarks.lib.narrow_plan import narrow_plan
from benchmarks.lib.training_runs import LAST
from norton_deploy.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from norton_deploy.checkpoints.compress_checkpoint import compress_checkpoint
from norton_deploy.compression.compress import compress
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.data.image_file import read_image
from norton_deploy.data.image_folder import find_images, read_images
from norton_deploy.errors import UserError
from norton_deploy.files import sha256_of
from norton_deploy.inference.predictor import Image, Predictor
from norton_deploy.method.plan import FORMS, CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.charts import DENSE, STAGE_COLOURS, chart, legend_above
from norton_deploy.reporting.provenance import machine_values, provenance
from norton_deploy.reporting.report import Table
from norton_deploy.search.form_tuning import TimingTable
from norton_deploy.search.latency_budget import Workload, tuned_predictor
from norton_deploy.search.plan_search import TIMING_IMAGES, PlanRequest, PlanSearch
from norton_deploy.training.detector_training import Distill

FAMILIES: dict[str, tuple[str, ...]] = {
    "pruning alone": (),
    "NORTON": ("ranks",),
    "coupled": ("coupled",),
    "Tucker-2": ("tucker",),
    "mixed": FORMS,
}
DENSE_CELL = "dense"
TUNED = ", fine-tuned"
"""How the names of cells about fine-tuned detectors end."""
UNIFORM = "uniform "
"""How the names of cells about plans of configs/plans begin."""
COLOURS = (*STAGE_COLOURS, "#555555")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of benchmarks/pareto.py."""

    model: Path
    """Trained dense detector (.safetensors)."""
    data: Path
    """Dataset in COCO's layout that it was trained on."""
    speedups: tuple[float, ...] = (1.5, 2.0, 2.5)
    """Budgets: times as fast as the dense detector."""
    families: tuple[str, ...] = tuple(FAMILIES)
    """Which forms the plans may have."""
    uniform: tuple[str, ...] = ("table3", "balanced", "fast")
    """Plans of configs/plans to compare with, brought to the detector's widths by equal shares of filters."""
    image_size: tuple[int, int] | None = None
    """Height and width that are timed; by default the detector's own."""
    images: int = 8
    """Images on which harm is measured."""
    fit_images: int = 32
    """Images to which the search fits its choices."""
    refit_images: int = 64
    """Unlabelled images for the refit."""
    val_images: int = 200
    """Evaluate on the first so many images of val."""
    finetune_steps: int = 0
    """Steps of fine-tuning with the dense detector as teacher; 0 leaves it out."""
    finetune_lr: float = 0.0015
    """Peak learning rate of these steps."""
    distill: Distill = "both"
    """What is imitated in these steps."""
    precision: Precision = "no"
    """Precision of these steps; evaluation is in float32."""
    rounds: int = 20
    """Measured calls of each plan."""
    seed: int = 0
    """Seed of decompositions and fine-tuning."""
    work: Path = Path("runs/pareto")
    """Folder for layer times, harms, models and runs."""
    out: Path = RESULTS / "pareto.json"
    """Results; tables (.md) and the picture (.png) are written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    for family in settings.families:
        if family not in FAMILIES:
            raise UserError(f"--families: {family} is none of {', '.join(FAMILIES)}")
    dense = load_checkpoint(settings.model)
    task = task_of(dense, settings.model)
    settings.work.mkdir(parents=True, exist_ok=True)
    tuning = ("finetune_steps", "finetune_lr", "distill", "precision")
    kept_out = ("families", "speedups", "uniform", "model", "data", *tuning)
    key = {**settings_of(settings, *kept_out), "model_sha256": sha256_of(settings.model), "task": task}
    results = ResultCells(settings.out, key, report)
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        DENSE_CELL: partial(average_precision, settings.model, task, settings.data, settings.val_images)
    }
    for speedup in settings.speedups:
        for family in settings.families:
            cells[f"{family} at {speedup:g}"] = partial(measure, settings, dense, family, speedup)
    for name in settings.uniform:
        cells[f"{UNIFORM}{name}"] = partial(measure_uniform, settings, dense, name)
    results.measure_all(cells)
    if not settings.finetune_steps:
        return 0
    made = [name for name in cells if "impossible" not in results.cells[name]]
    return results.measure_all({f"{name}{TUNED}": partial(tune, settings, dense, name, results) for name in made})


def tune(settings: Settings, dense: Checkpoint, name: str, results: ResultCells) -> Cell:
    """Train a plan's detector, or the dense one, further."""
    start = settings.model if name == DENSE_CELL else folder_of(settings, name) / LAST
    if not start.is_file():
        save_small(settings, dense, CompressionPlan.from_dict(results.cells[name]["plan"]), name)
    task = task_of(dense, settings.model)
    recipe = {"steps": settings.finetune_steps, "lr": settings.finetune_lr, "precision": settings.precision}
    imitation = {} if name == DENSE_CELL else {"teacher": settings.model, "distill": settings.distill}
    trained = finetuned(
        start, task, settings.data, settings.work / f"{folder_of(settings, name).name}-trained", seed=settings.seed,
        **recipe, **imitation,
    )  # fmt: skip
    figures = average_precision(trained, task, settings.data, settings.val_images)
    return {"tuning": {**recipe, "distill": settings.distill}, **figures}


def measure(settings: Settings, dense: Checkpoint, family: str, speedup: float) -> dict[str, Any]:
    """Search a plan of some forms, and what comes of it."""
    work = settings.work
    request = PlanRequest(
        budget=f"speedup={speedup:g}", data=settings.data / "train2017", image_size=settings.image_size,
        images=settings.images, fit_images=settings.fit_images, sensitivity_size=dense.header.detector.image.min_size,
        forms=FAMILIES[family], rounds=settings.rounds, resume=True, seed=settings.seed,
    )  # fmt: skip
    search = PlanSearch(
        dense, request, times_of_layers(settings),
        sensitivity_file=work / "harm.json", report=lambda line: print(line, file=sys.stderr),
        progress=lambda done, count: None,
    )  # fmt: skip
    try:
        found = search.find()
    except UserError as error:
        if "the smallest one considered" not in str(error):
            raise
        return {"impossible": str(error)}
    record = found.to_dict()
    names = (
        "measured_speedup",
        "measured_speedup_p10_p90",
        "prediction_error",
        "predicted_harm",
        "measured_harm",
        "macs",
    )
    figures = {name: record[name] for name in names} | {"seconds_of_search": record["seconds"]}
    return figures | finish(settings, dense, found.plan, f"{family} at {speedup:g}")


def measure_uniform(settings: Settings, dense: Checkpoint, name: str) -> dict[str, Any]:
    """Time a plan of configs/plans in turn with the dense detector, and what comes of it."""
    model, task = dense.model, dense.header.task
    full = DetectorSettings(num_classes=dense.header.detector.num_classes).build(task)
    plan = narrow_plan(CompressionPlan.load(PLANS / f"{name}.yaml"), model, full)
    workload = Workload.of(model, settings.image_size or dense.header.settings.input_size)
    table = times_of_layers(settings)
    pictures = [read_image(path) for path in find_images(settings.data / "train2017")[:TIMING_IMAGES]]
    models = {"dense": model, name: compress(model, plan, seed=settings.seed, starts=1)}
    predictors = {
        key: tuned_predictor(made, workload, dense.header.categories, table, pictures) for key, made in models.items()
    }
    calls = {key: partial(call, predictor, pictures) for key, predictor in predictors.items()}
    turns = time_in_turns(calls, rounds=settings.rounds, warm_up=1)
    ratios = turns.of("dense") / turns.of(name)
    low, middle, high = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
    counted = workload.complexity(models[name]).macs
    return {
        "measured_speedup": middle, "measured_speedup_p10_p90": [low, high], "macs": counted,
        **finish(settings, dense, plan, f"{UNIFORM}{name}"),
    }  # fmt: skip


def call(predictor: Predictor, pictures: Sequence[Image], step: int) -> object:
    """One picture from pixels to detections."""
    return predictor([pictures[step % len(pictures)]])


def times_of_layers(settings: Settings) -> TimingTable:
    """Kept from plan to plan."""
    return TimingTable(settings.work / "times.json", machine_values(provenance()))


def finish(settings: Settings, dense: Checkpoint, plan: CompressionPlan, name: str) -> dict[str, Any]:
    """Compress by a plan, refit and evaluate."""
    start = save_small(settings, dense, plan, name)
    figures = average_precision(start, task_of(dense, settings.model), settings.data, settings.val_images)
    return {"plan": plan.to_dict(), **figures}


def save_small(settings: Settings, dense: Checkpoint, plan: CompressionPlan, name: str) -> Path:
    """Compress by a plan and refit; returns the checkpoint's file."""
    small = compress_checkpoint(
        dense, plan, command=provenance()["command"], source=settings.model, seed=settings.seed,
        refit_images=read_images(settings.data / "train2017", settings.refit_images),
    )  # fmt: skip
    start = folder_of(settings, name) / LAST
    start.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(start, small.model, small.header)
    return start


def folder_of(settings: Settings, name: str) -> Path:
    """Of a cell."""
    return settings.work / name.removeprefix(UNIFORM).replace(" at ", "-").replace(" ", "-")


def report(results: ResultCells) -> str:
    """A row per plan, how well harm orders them, and the picture."""
    cells = {name: cell for name, cell in results.cells.items() if "impossible" not in cell and "tuning" not in cell}
    tuned = {name: results.cells[f"{name}{TUNED}"] for name in cells if f"{name}{TUNED}" in results.cells}
    dense = cells[DENSE_CELL]
    plans = {name: cell for name, cell in cells.items() if name != DENSE_CELL}
    stages = {"refitted": cells} | ({f"after {steps_of(tuned)} steps": tuned} if tuned else {})
    if plans:
        draw(results.path.with_suffix(".png"), plans, stages)

    def kept(row: tuple[str, Cell], kind: str, stage: str) -> str:
        known = stages[stage]
        if row[0] not in known:
            return "-"
        return f"{ap_of(known[row[0]], kind):.3f} ({ap_of(known[row[0]], kind) / ap_of(known[DENSE_CELL], kind):.2f})"

    columns: dict[str, Callable[[tuple[str, Cell]], str]] = {
        "Plan": lambda row: row[0],
        "Speed-up (10th to 90th percentile)": lambda row: "{:.2f} ({:.2f} to {:.2f})".format(
            row[1]["measured_speedup"], *row[1]["measured_speedup_p10_p90"]
        ),
        "Prediction off by": lambda row: (
            f"{100 * row[1]['prediction_error']:+.0f} %" if "prediction_error" in row[1] else "-"
        ),
        "Harm, predicted / measured": lambda row: (
            f"{row[1]['predicted_harm']:.2f} / {row[1]['measured_harm']:.2f}" if "measured_harm" in row[1] else "-"
        ),
    }
    for kind, stage in product(dense["metrics"], stages):
        columns[f"{kind} AP, {stage} (kept)"] = partial(kept, kind=kind, stage=stage)
    aps = [
        f"{'dense' if stage == 'refitted' else f'dense {stage}'}: "
        + ", ".join(f"{kind} AP {ap_of(known[DENSE_CELL], kind):.3f}" for kind in dense["metrics"])
        for stage, known in stages.items()
    ]
    caption = f"Plans by form and budget; {'; '.join(aps)}; {dense['images']} val images"
    none = [name for name, cell in results.cells.items() if "impossible" in cell]
    parts: list[Table | str] = [
        tabulate(caption, plans.items(), columns),
        *order_of_plans(plans, stages),
        *([f"Not possible with what is considered: {', '.join(none)}."] if none else []),
    ]
    return page(*parts)


def ap_of(cell: Cell, kind: str) -> float:
    """AP, 0..1."""
    ap: float = cell["metrics"][kind]["AP"]
    return ap


def steps_of(tuned: Mapping[str, Cell]) -> int:
    """Of the fine-tunings, which all have the same."""
    recipes = [cell["tuning"] for cell in tuned.values()]
    if any(recipe != recipes[0] for recipe in recipes):
        raise UserError("these results were fine-tuned by different recipes; give the old one or another --out")
    steps: int = recipes[0]["steps"]
    return steps


def order_of_plans(plans: Mapping[str, Cell], stages: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """Rank correlation of the planner's harm with the AP that is lost."""
    lines = []
    for stage, cells in stages.items():
        known = [name for name in plans if name in cells and "measured_harm" in plans[name]]
        if len(known) < 3:
            continue
        kind = list(cells[known[0]]["metrics"])[-1]
        lost = [-ap_of(cells[name], kind) for name in known]
        for harm in ("predicted_harm", "measured_harm"):
            rho = spearmanr([plans[name][harm] for name in known], lost).statistic
            about = f"{harm.replace('_', ' ')} and lost {kind} AP, {stage}"
            lines.append(f"Rank correlation of {about}, {len(known)} plans: {rho:.2f}.")
    return lines


def draw(path: Path, plans: Mapping[str, Cell], stages: Mapping[str, Mapping[str, Cell]]) -> None:
    """Share of AP kept against speed-up, a line per family; hollow marks: refitted only."""
    with chart(path, 4.2) as axes:
        axes.plot(1, 1, "o", color=DENSE, markersize=9, label="dense")
        for family, colour, mark in zip((*FAMILIES, UNIFORM), COLOURS, "sDv^oX", strict=True):
            own = sorted(
                (name for name in plans if name.startswith(family)), key=lambda name: plans[name]["measured_speedup"]
            )
            last = list(stages)[-1]
            for stage, cells in stages.items():
                known = [name for name in own if name in cells]
                if known:
                    dense = cells[DENSE_CELL]
                    kind = list(dense["metrics"])[-1]
                    axes.plot(
                        [plans[name]["measured_speedup"] for name in known],
                        [ap_of(cells[name], kind) / ap_of(dense, kind) for name in known],
                        f"{'-' if stage == last else ':'}{mark}", color=colour, linewidth=1, markersize=6,
                        fillstyle="full" if stage == last else "none",
                        label=family.strip() if stage == last else None,
                    )  # fmt: skip
        axes.set_xlabel("Speed-up over dense in ONNX Runtime, measured")
        axes.set_ylabel(f"Share of {kind} AP kept")
        axes.set_ylim(0, 1.05)
        legend_above(axes, columns=3)


if __name__ == "__main__":
    run(Settings, main)

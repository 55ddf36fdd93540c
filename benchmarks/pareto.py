"""What speed costs: AP kept against measured speed-up, for plans of one form each and for plans that mix all forms.

A trained dense detector is planned for several speed-ups of ONNX Runtime on this machine: by pruning alone, with the
filters' own CPD (the paper's form), coupled filters, Tucker-2, or whatever is best for each layer. Every plan prunes as
well, by harm. It is compressed, refitted on unlabelled images and evaluated; with --finetune-steps it is then trained
with the dense detector as teacher. The uniform plans of configs/plans, whose filters are chosen by angles as in the
paper, are made, refitted and timed beside them. Times are those of the search, the plan and the dense detector in turn.
How well the planner's harm orders the plans by AP is stated as a rank correlation. A finished plan is not made again.

    python benchmarks/pareto.py --model runs/mask/last.safetensors --data runs/data
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.lib.cells import RESULTS, Cell, ResultCells, page, run, settings_of, tabulate
from benchmarks.lib.narrow_plan import narrow_plan
from benchmarks.lib.random_detectors import PLANS
from benchmarks.lib.training_runs import LAST, read_recipe, train_once
from norton_deploy.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from norton_deploy.checkpoints.compress_checkpoint import compress_checkpoint
from norton_deploy.compression.compress import compress
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.data.image_file import read_image
from norton_deploy.data.image_folder import find_images, read_images
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_file
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
from norton_deploy.training.detector_training import DetectorTrainingSettings

FAMILIES: dict[str, tuple[str, ...]] = {
    "pruning alone": (),
    "NORTON": ("ranks",),
    "coupled": ("coupled",),
    "Tucker-2": ("tucker",),
    "mixed": FORMS,
}
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
    settings.work.mkdir(parents=True, exist_ok=True)
    kept_out = ("families", "speedups", "uniform", "model", "data")
    key = {**settings_of(settings, *kept_out), "model_sha256": sha256_of(settings.model), "task": dense.header.task}
    results = ResultCells(settings.out, key, report)
    cells: dict[str, Callable[[], dict[str, Any]]] = {"dense": partial(evaluate, settings, settings.model, dense)}
    for speedup in settings.speedups:
        for family in settings.families:
            cells[f"{family} at {speedup:g}"] = partial(measure, settings, dense, family, speedup)
    for name in settings.uniform:
        cells[f"{UNIFORM}{name}"] = partial(measure_uniform, settings, dense, name)
    return results.measure_all(cells)


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
    return figures | finish(settings, dense, found.plan, f"{family} {speedup:g}".replace(" ", "-"))


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
        **finish(settings, dense, plan, name),
    }  # fmt: skip


def call(predictor: Predictor, pictures: Sequence[Image], step: int) -> object:
    """One picture from pixels to detections."""
    return predictor([pictures[step % len(pictures)]])


def times_of_layers(settings: Settings) -> TimingTable:
    """Kept from plan to plan."""
    return TimingTable(settings.work / "times.json", machine_values(provenance()))


def finish(settings: Settings, dense: Checkpoint, plan: CompressionPlan, name: str) -> dict[str, Any]:
    """Compress by a plan, refit, evaluate and perhaps fine-tune."""
    work = settings.work
    small = compress_checkpoint(
        dense, plan, command=provenance()["command"], source=settings.model, seed=settings.seed,
        refit_images=read_images(settings.data / "train2017", settings.refit_images),
    )  # fmt: skip
    start = work / name / LAST
    start.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(start, small.model, small.header)
    figures = {"plan": plan.to_dict(), **evaluate(settings, start, dense)}
    if settings.finetune_steps:
        recipe = read_recipe(
            DetectorTrainingSettings, f"demo_{dense.header.task}", out=work / f"{name}-trained", data=settings.data,
            init=start, teacher=settings.model, steps=settings.finetune_steps, lr=settings.finetune_lr,
            seed=settings.seed,
        )  # fmt: skip
        train_once(replace(recipe, evaluate_every=0))
        figures["finetuned"] = evaluate(settings, recipe.out / LAST, dense)["metrics"]
    return figures


def evaluate(settings: Settings, model: Path, dense: Checkpoint) -> dict[str, Any]:
    """AP on the val split."""
    task: Any = dense.header.task
    found = evaluate_file(model, settings.data, task, limit=settings.val_images, progress=False).to_dict()
    return {"images": found["images"], "metrics": found["metrics"]}


def report(results: ResultCells) -> str:
    """A row per plan, how well harm orders them, and the picture."""
    cells = {name: cell for name, cell in results.cells.items() if "impossible" not in cell}
    dense = cells["dense"]
    plans = {name: cell for name, cell in cells.items() if name != "dense"}
    steps = results.settings["finetune_steps"]
    if plans:
        draw(results.path.with_suffix(".png"), plans, dense, steps)

    def kept(cell: Cell, kind: str, metrics: str = "metrics") -> str:
        if metrics not in cell:
            return "-"
        ap = cell[metrics][kind]["AP"]
        return f"{ap:.3f} ({ap / dense['metrics'][kind]['AP']:.2f})"

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
    for kind in dense["metrics"]:
        columns[f"{kind} AP, refitted (kept)"] = lambda row, kind=kind: kept(row[1], kind)  # type: ignore[misc]  # binds it
        if steps:
            title = f"{kind} AP after {steps} steps (kept)"
            columns[title] = lambda row, kind=kind: kept(row[1], kind, "finetuned")  # type: ignore[misc]  # binds it
    dense_aps = ", ".join(f"{kind} AP {scores['AP']:.3f}" for kind, scores in dense["metrics"].items())
    caption = f"Plans by form and budget; dense: {dense_aps}, {dense['images']} val images"
    none = [name for name, cell in results.cells.items() if "impossible" in cell]
    parts: list[Table | str] = [
        tabulate(caption, plans.items(), columns),
        *order_of_plans(plans, dense, steps),
        *([f"Not possible with what is considered: {', '.join(none)}."] if none else []),
    ]
    return page(*parts)


def order_of_plans(plans: dict[str, Cell], dense: Cell, steps: int) -> list[str]:
    """Rank correlation of the planner's harm with the AP that is lost."""
    lines = []
    for metrics, when in (("metrics", "after the refit"), ("finetuned", f"after {steps} steps")):
        known = [cell for cell in plans.values() if metrics in cell and "measured_harm" in cell]
        if len(known) < 3:
            continue
        kind = list(dense["metrics"])[-1]
        lost = [-cell[metrics][kind]["AP"] for cell in known]
        for harm in ("predicted_harm", "measured_harm"):
            rho = spearmanr([cell[harm] for cell in known], lost).statistic
            about = f"{harm.replace('_', ' ')} and lost {kind} AP {when}"
            lines.append(f"Rank correlation of {about}, {len(known)} plans: {rho:.2f}.")
    return lines


def draw(path: Path, plans: dict[str, Cell], dense: Cell, steps: int) -> None:
    """Share of AP kept against speed-up, a line per family; hollow marks: refitted only."""
    kind = list(dense["metrics"])[-1]
    whole = dense["metrics"][kind]["AP"]
    with chart(path, 4.2) as axes:
        axes.plot(1, 1, "o", color=DENSE, markersize=9, label="dense")
        for family, colour, mark in zip((*FAMILIES, UNIFORM), COLOURS, "sDv^oX", strict=True):
            own = [cell for name, cell in plans.items() if name.startswith(family)]
            own.sort(key=lambda cell: cell["measured_speedup"])
            for metrics, fill in (("finetuned", "full"), ("metrics", "none" if steps else "full")):
                known = [cell for cell in own if metrics in cell]
                if known:
                    axes.plot(
                        [cell["measured_speedup"] for cell in known],
                        [cell[metrics][kind]["AP"] / whole for cell in known],
                        f"-{mark}", color=colour, fillstyle=fill, linewidth=1, markersize=6,
                        label=family.strip() if fill == "full" else None,
                    )  # fmt: skip
        axes.set_xlabel("Speed-up over dense in ONNX Runtime, measured")
        axes.set_ylabel(f"Share of {kind} AP kept")
        axes.set_ylim(0, 1.05)
        legend_above(axes, columns=3)


if __name__ == "__main__":
    run(Settings, main)

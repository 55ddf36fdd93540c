"""What quick recovery without labels is worth in AP, before any fine-tuning.

A trained dense detector is compressed by several plans and evaluated as it is, after BatchNorm re-estimation, after
the layer-wise least-squares refit, and after both (the refit first). Recovery sees training images without their
labels; AP is that of the val split. As a control, the dense detector itself is re-estimated. A cell that is in the
results file is not run again.

A plan for torchvision's widths is brought to the detector's: the same share of every group's filters.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, run, settings_of, tabulate
from benchmarks.lib.narrow_plan import compress_recovered, narrow_plan
from benchmarks.lib.rank_one import rank_one_plan
from norton_deploy.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from norton_deploy.cost.complexity import complexity_of
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.files import sha256_of
from norton_deploy.method.plan import WHOLE_DETECTOR, CompressionPlan
from norton_deploy.models.detectors import DetectorSettings

GENTLE = "body at rank 1"
CONTROL = "dense"
VARIANTS = ("as it is", "re-estimation", "refit", "refit, re-estimation", "chosen by harm, refit")


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/recovery.py."""

    model: Path
    """Trained dense detector (.safetensors)."""
    data: Path
    """Dataset in COCO's layout that it was trained on."""
    plans: tuple[Path, ...] = (PLANS / "table3.yaml", PLANS / "balanced.yaml", PLANS / "fast.yaml")
    """Plans to compress it by."""
    variants: tuple[str, ...] = VARIANTS[:4]
    """Which recoveries; "chosen by harm, refit" also chooses the filters on the refit's images."""
    gentle: bool = True
    """Also try the body's 3x3 convolutions at rank 1 without any pruning, where some AP survives compression."""
    forms: tuple[str, ...] = ()
    """Also try all 3x3 convolutions, those of pyramid and heads included, in such a form at the MACs of rank 1, without
    any pruning: filter (the paper's), tucker, layer_cp, coupled N."""
    refit_images: int = 64
    """Unlabelled images for the refit."""
    reestimate_images: int = 256
    """Unlabelled images for the re-estimation."""
    val_images: int | None = None
    """Evaluate on the first so many images of val only."""
    workers: int = 1
    """Processes that decode images."""
    out: Path = RESULTS / "recovery.json"
    """Results file; a Markdown table is written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    dense = load_checkpoint(settings.model)
    if dense.header.task == "cls" or dense.header.plan is not None:
        raise UserError(f"{settings.model}: expected a dense detector")
    plans = {path.stem: CompressionPlan.load(path) for path in settings.plans}
    if settings.gentle:
        body = CompressionPlan.load(PLANS / "table3.yaml")
        plans = {GENTLE: replace(body, keep={}, note="rank 1, no pruning"), **plans}
    full = DetectorSettings(num_classes=dense.header.detector.num_classes).build(dense.header.task)
    plans = {name: narrow_plan(plan, dense.model, full) for name, plan in plans.items()}
    for form in settings.forms:
        size = dense.header.settings.input_size
        plans[f"3x3, {form}, MACs of rank 1"] = rank_one_plan(dense.model, WHOLE_DETECTOR, size, form)
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        CONTROL: partial(evaluate, settings, settings.model, dense.header.task),
        # what re-estimation does where nothing was compressed
        f"{CONTROL}: re-estimation": partial(measure, settings, dense, CompressionPlan(WHOLE_DETECTOR), VARIANTS[1]),
    }
    if VARIANTS[1] not in settings.variants:
        del cells[f"{CONTROL}: re-estimation"]
    for name, plan in plans.items():
        for variant in settings.variants:
            cells[f"{name}: {variant}"] = partial(measure, settings, dense, plan, variant)
    key = {
        **settings_of(settings, "plans", "gentle", "forms", "variants", "workers"),
        "model_sha256": sha256_of(settings.model),
    }
    return ResultCells(settings.out, key, report).measure_all(cells)


def measure(settings: Settings, dense: Checkpoint, plan: CompressionPlan, variant: str) -> dict[str, Any]:
    """Compress with the variant's recovery, then evaluate."""
    started = time.perf_counter()
    small = compress_recovered(
        dense,
        settings.model,
        plan,
        settings.data / "train2017",
        refit=settings.refit_images if "refit" in variant else 0,
        reestimate=settings.reestimate_images if "re-estimation" in variant else 0,
        choose="harm" if "harm" in variant else "angles",
    )
    seconds = round(time.perf_counter() - started, 1)
    counted = complexity_of(small.model, small.header.settings)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "compressed.safetensors"
        save_checkpoint(file, small.model, small.header)
        scores = evaluate(settings, file, dense.header.task)
    return {"compress_s": seconds, "macs": counted.macs, "params": counted.params, **scores}


def evaluate(settings: Settings, model: Path, task: Any) -> dict[str, Any]:
    """AP and AR on the val split."""
    limit, workers = settings.val_images, settings.workers
    found = evaluate_file(model, settings.data, task, limit=limit, workers=workers, progress=False).to_dict()
    return {"images": found["images"], "metrics": found["metrics"]}


def report(results: ResultCells) -> str:
    """A row per plan and recovery: AP and AP50 of boxes and, where there are, masks or keypoints."""
    cells, settings = results.cells, results.settings
    plans = list(dict.fromkeys(name.partition(": ")[0] for name in cells))
    ordered = (f"{plan}: {variant}" if variant else plan for plan in plans for variant in ("", *VARIANTS))

    def score(kind: str, measure: str) -> Callable[[tuple[str, Cell]], str]:
        return lambda row: f"{row[1]['metrics'][kind][measure]:.3f}"

    return tabulate(
        f"Before any fine-tuning: {cells[CONTROL]['images']} val images; refit on {settings['refit_images']}, "
        f"re-estimation on {settings['reestimate_images']} training images without their labels",
        [(name, cells[name]) for name in ordered if name in cells],
        {
            "Plan": lambda row: row[0].partition(": ")[0],
            "Recovery": lambda row: row[0].partition(": ")[2] or "-",
            "GMACs": lambda row: f"{row[1]['macs'] / 1e9:.2f}" if "macs" in row[1] else "-",
            **{
                f"{kind} {measure}": score(kind, measure)
                for kind in cells[CONTROL]["metrics"]
                for measure in ("AP", "AP50")
            },
            "compress s": lambda row: f"{row[1]['compress_s']:.0f}" if "compress_s" in row[1] else "-",
        },
    ).to_markdown()


if __name__ == "__main__":
    run(Settings, main)

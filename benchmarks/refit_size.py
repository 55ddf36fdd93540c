"""What smaller images save in the refit, and what they cost: seconds, memory and AP by the images' short side.

A trained detector is compressed and refitted on unlabelled images of several sizes, nothing is trained, and its AP is
that at its own size. Seconds and memory of a detector of torchvision's widths at 800 pixels are measured with random
weights, which take as long. Every refit has a process of its own, so its peak memory is its own.

    python benchmarks/refit_size.py --model runs/mask/last.safetensors --data runs/data
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, page, run, settings_of, tabulate
from benchmarks.lib.narrow_plan import narrow_plan
from benchmarks.random_detector import Settings as RandomDetector
from benchmarks.random_detector import main as make_random_detector
from norton_deploy.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from norton_deploy.checkpoints.compress_checkpoint import compress_checkpoint
from norton_deploy.data.image_folder import read_images
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.files import sha256_of
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.provenance import provenance


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of benchmarks/refit_size.py."""

    model: Path
    """Trained dense detector (.safetensors)."""
    data: Path
    """Dataset in COCO's layout that it was trained on."""
    plan: str = "fast"
    """Plan of configs/plans, brought to the detector's widths by equal shares of filters."""
    sides: tuple[int, ...] = (192, 144, 96)
    """Short sides of the images in pixels."""
    wide_sides: tuple[int, ...] = (400, 800)
    """The same for the detector of torchvision's widths."""
    images: int = 64
    """Unlabelled images."""
    val_images: int = 200
    """Evaluate on the first so many images of val."""
    work: Path = Path("runs/refit_size")
    """Folder for models."""
    out: Path = RESULTS / "refit_size.json"
    """Results; a Markdown table is written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    settings.work.mkdir(parents=True, exist_ok=True)
    key = {
        **settings_of(settings, "model", "data", "sides", "wide_sides"),
        "model_sha256": sha256_of(settings.model),
        "task": load_checkpoint(settings.model).header.task,
    }
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        "dense": lambda: {"metrics": evaluate(settings, settings.model)},
        "compressed, not refitted": partial(measure, settings, settings.model, None),
    }
    for side in settings.sides:
        cells[f"{side} px"] = partial(measure, settings, settings.model, side)
    for side in settings.wide_sides:
        cells[f"torchvision's widths, {side} px"] = partial(measure_wide, settings, side)
    return ResultCells(settings.out, key, report).measure_all(cells)


def measure(settings: Settings, model: Path, side: int | None) -> dict[str, Any]:
    """Time, memory and AP of one refit, or the AP without one."""
    out = settings.work / f"{side or 'not'}.safetensors"
    return {**in_own_process(settings, model, side, out), "metrics": evaluate(settings, out)}


def measure_wide(settings: Settings, side: int) -> dict[str, Any]:
    """Time and memory of one refit of a large detector."""
    model = settings.work / "wide.safetensors"
    if not model.is_file():
        make_random_detector(RandomDetector(out=model, task="mask"))
    return in_own_process(settings, model, side, settings.work / "wide_small.safetensors")


def in_own_process(settings: Settings, model: Path, side: int | None, out: Path) -> dict[str, Any]:
    """What `compress_model` tells, run where nothing else has used memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(compress_model, settings, model, side, out, torch.get_num_threads()).result()


def compress_model(settings: Settings, model: Path, side: int | None, out: Path, threads: int) -> dict[str, Any]:
    """Compress, refit and save; seconds of it and the peak memory."""
    torch.set_num_threads(threads)
    dense = load_checkpoint(model)
    full = DetectorSettings(num_classes=dense.header.detector.num_classes).build(dense.header.task)
    plan = narrow_plan(CompressionPlan.load(PLANS / f"{settings.plan}.yaml"), dense.model, full)
    started = time.perf_counter()
    small = compress_checkpoint(
        dense, plan, command=provenance()["command"], source=model, refit_side=side,
        refit_images=None if side is None else read_images(settings.data / "train2017", settings.images),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    save_checkpoint(out, small.model, small.header)
    return {"refit_seconds": round(seconds, 1), "peak_gib": round(peak, 2)}


def evaluate(settings: Settings, model: Path) -> dict[str, Any]:
    """AP on the val split."""
    task: Any = load_checkpoint(model).header.task
    found = evaluate_file(model, settings.data, task, limit=settings.val_images, progress=False).to_dict()
    metrics: dict[str, Any] = found["metrics"]
    return metrics


def report(results: ResultCells) -> str:
    """A row for each size."""
    told = results.settings
    caption = f"Refit of `{told['plan']}` on {told['images']} images, untrained; AP on {told['val_images']} images"

    def ap(kind: str) -> Callable[[tuple[str, Cell]], str]:
        return lambda row: f"{row[1]['metrics'][kind]['AP']:.3f}" if "metrics" in row[1] else "-"

    columns: dict[str, Callable[[tuple[str, Cell]], str]] = {
        "Images of the refit": lambda row: row[0],
        "Seconds": lambda row: f"{row[1]['refit_seconds']:.0f}" if "refit_seconds" in row[1] else "-",
        "Peak memory, GiB": lambda row: f"{row[1]['peak_gib']:.1f}" if "peak_gib" in row[1] else "-",
        **{f"{kind} AP": ap(kind) for kind in results.cells["dense"]["metrics"]},
    }
    return page(tabulate(caption, results.cells.items(), columns))


if __name__ == "__main__":
    run(Settings, main)

"""What fixed image sizes cost in AP: a checkpoint at its own sizes, one letterboxed graph, and graphs by aspect ratio.

The checkpoint resizes each image as torchvision does. Every other row is one graph or several: with several, each
image goes to the graph whose aspect ratio is nearest. Latency is that of all rows in turn on the same images,
first-come preparation of graphs excluded. A results file holds one model on one dataset.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.lib.cells import RESULTS, ResultCells, run, tabulate
from norton_deploy.data.image_folder import find_images
from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import primary_iou_type
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.inference.loading import load_predictor
from norton_deploy.parity.export_checked import ExportOptions, export_checked, open_detector
from norton_deploy.reporting.latency import measure_alternating

CHECKPOINT = "checkpoint, torchvision's resizing"
LATENCY = "latency"


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/size_buckets.py."""

    model: Path
    """Checkpoint of a trained detector."""
    data: Path
    """Dataset in COCO's layout; its val split is evaluated."""
    graphs: tuple[str, ...] = ("192x256+256x192+192x192", "256x256", "192x192")
    """Rows: sizes HxW of one graph, or of several joined by +."""
    latency_images: int = 24
    """Images whose latency is measured, each once by every row after a warm-up."""
    out: Path = RESULTS / "size_buckets.json"
    """Results file; a Markdown table is written beside it."""
    work: Path = Path("runs/size_buckets")
    """Folder for the graphs."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    model, task, categories = open_detector(str(settings.model))
    images = find_images(settings.data / "val2017")

    @cache
    def graph(size: str) -> Path:
        height, cross, width = size.partition("x")
        if not (cross and height.isdigit() and width.isdigit()):
            raise UserError(f"--graphs {size}: expected sizes such as 192x256, several joined by +")
        options = ExportOptions(image_size=(int(height), int(width)))
        file = settings.work / f"{size}.onnx"
        return export_checked(model, task, categories, file, options, report=partial(print, file=sys.stderr)).file

    def files(row: str) -> list[Path]:
        return [settings.model] if row == CHECKPOINT else [graph(size) for size in row.split("+")]

    def score(row: str) -> dict[str, float]:
        metrics = evaluate_file(files(row), settings.data, task).evaluation.metrics[primary_iou_type(task)]
        return {"AP": metrics["AP"], "AP50": metrics["AP50"]}

    def latency() -> dict[str, Any]:
        chosen = images[: settings.latency_images]
        predictors = {row: load_predictor(files(row)) for row in rows}
        ledger = measure_alternating(predictors, chosen, rounds=len(chosen))
        return {row: ledger.summary(row).to_dict() for row in rows}

    settings.work.mkdir(parents=True, exist_ok=True)
    rows = (CHECKPOINT, *settings.graphs)
    cells: dict[str, Callable[[], dict[str, Any]]] = {row: partial(score, row) for row in rows}
    key = {
        "model": str(settings.model),
        "task": task,
        "data": f"{len(images)} images of {settings.data}",
        "latency_images": settings.latency_images,
    }
    return ResultCells(settings.out, key, report).measure_all({**cells, LATENCY: latency})


def report(results: ResultCells) -> str:
    """One row for the checkpoint and each choice of graphs."""
    cells, settings = results.cells, results.settings
    latency = cells.get(LATENCY, {})
    return tabulate(
        f"{settings['model']} ({settings['task']}) on {settings['data']}",
        [row for row in cells if row != LATENCY],
        {
            "Sizes": str,
            "AP": lambda row: f"{cells[row]['AP']:.4f}",
            "Against the checkpoint": lambda row: f"{cells[row]['AP'] - cells[CHECKPOINT]['AP']:+.4f}",
            "AP50": lambda row: f"{cells[row]['AP50']:.4f}",
            "p50 ms": lambda row: f"{latency[row]['p50_ms']:.1f}" if row in latency else "-",
        },
    ).to_markdown()


if __name__ == "__main__":
    run(Settings, main)

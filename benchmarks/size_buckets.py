"""What fixed image sizes cost in AP: a checkpoint at its own sizes, one letterboxed graph, and graphs by aspect ratio.

The checkpoint resizes each image as torchvision does. Every other row is one graph or several: with several, each
image goes to the graph whose aspect ratio is nearest (runtime/size_buckets.py). Latency is that of all rows in turn
on the same images, first-come preparation of graphs excluded. A results file holds one model on one dataset.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.commands import export_onnx, write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.image_folder import find_images
from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import primary_iou_type
from norton_deploy.evaluation.evaluate import evaluate_detector
from norton_deploy.files import atomic_write
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import Predictor
from norton_deploy.reporting.latency import measure_alternating, summary_to_dict
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.structures import TASKS

RESULTS = Path(__file__).parent / "results"
CHECKPOINT = "checkpoint, torchvision's resizing"


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


def main() -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, prog="size_buckets", description=__doc__ or "")
    task = load_checkpoint(settings.model).header.task
    if task not in TASKS:
        raise UserError(f"{settings.model}: a classifier; expected a detector")
    predictors: dict[str, Predictor] = {CHECKPOINT: load_predictor(settings.model)}
    with tempfile.TemporaryDirectory() as folder:
        for row in settings.graphs:
            predictors[row] = load_predictor([_export(settings.model, size, Path(folder)) for size in row.split("+")])
    dataset = CocoDetection(settings.data, "val", task, categories=predictors[CHECKPOINT].categories)
    rows: dict[str, Any] = {}
    for name, predictor in predictors.items():
        metrics = evaluate_detector(predictor, dataset).metrics[primary_iou_type(task)]
        rows[name] = {"AP": metrics["AP"], "AP50": metrics["AP50"]}
        print(f"{name}: AP {metrics['AP']:.4f}, AP50 {metrics['AP50']:.4f}", file=sys.stderr)
    images = find_images(settings.data / "val2017")[: settings.latency_images]
    run = measure_alternating(predictors, images, rounds=len(images), warm_up=2)
    for name in predictors:
        rows[name]["latency"] = summary_to_dict(run.summary(name))
    results = {
        "model": str(settings.model),
        "task": task,
        "data": f"{len(dataset)} images of {settings.data}",
        "rows": rows,
        "provenance": provenance(),
    }
    write_json(results, settings.out)
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write(_table(results).to_markdown() + "\n")
    return 0


def _export(model: Path, size: str, folder: Path) -> Path:
    height, cross, width = size.partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise UserError(f"--graphs {size}: expected sizes such as 192x256, several joined by +")
    file = folder / f"{size}.onnx"
    if not file.is_file():
        export_onnx.main(["--model", str(model), "--image-size", height, width, "--out", str(file)])
    return file


def _table(results: dict[str, Any]) -> Table:
    base = results["rows"][CHECKPOINT]["AP"]
    rows = tuple(
        (
            name,
            f"{row['AP']:.4f}",
            f"{row['AP'] - base:+.4f}",
            f"{row['AP50']:.4f}",
            f"{row['latency']['p50_ms']:.1f}",
        )
        for name, row in results["rows"].items()
    )
    caption = f"{results['model']} ({results['task']}) on {results['data']}"
    return Table(("Sizes", "AP", "Against the checkpoint", "AP50", "p50 ms"), rows, caption)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

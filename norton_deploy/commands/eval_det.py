"""Score a detector on COCO-2017 or data in its layout: a checkpoint, an ONNX graph or a TensorRT engine.

One process: tools/eval_det.py ...; several: torchrun --nproc_per_node=8 tools/eval_det.py ...
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import PartialState

from norton_deploy.commands import Output, write_json
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError, require_least
from norton_deploy.evaluation.coco_metrics import metrics_table
from norton_deploy.evaluation.evaluate import evaluate_file, result_files, write_results
from norton_deploy.files import check_output_file
from norton_deploy.inference.predictor import Backend
from norton_deploy.structures import Task

FIRST = ("split", "limit", "batch-size", "device", "results", "overwrite", "json")


@dataclass(frozen=True)
class Settings(Output):
    """Settings of tools/eval_det.py."""

    task: Task
    """box, mask or keypoint."""
    data: Path
    """Folder in COCO-2017's layout."""
    model: Path
    """Detector: a checkpoint (.safetensors), torchvision's .pth, a graph (.onnx, .xml) or an engine (.engine)."""
    categories: Path | None = None
    """Categories of a .pth file: a COCO annotation file or a list of names; by default the data's."""
    backend: Backend | None = None
    """What runs an .onnx graph: onnxruntime (the default) or openvino."""
    split: Literal["train", "val"] = "val"
    """Which images to evaluate on."""
    limit: int | None = None
    """Evaluate on the first so many images only."""
    batch_size: int = 1
    """Images handed to the model at once."""
    workers: int = 2
    """Processes that decode images, for each evaluating process."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU if there is one."""
    results: Path | None = None
    """Write the detections as COCO results JSON; a mask or keypoint model's boxes go to NAME.bbox.json."""
    skip_bad: bool = False
    """Leave out bad images and annotations with one counted warning instead of stopping."""
    progress: bool = True
    """Show a progress bar."""
    resume: bool = False
    """Go on at the image where this very line was stopped; with --results, beside which the detections are kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="eval_det", description=__doc__ or "")
    require_least(1, batch_size=settings.batch_size, limit=settings.limit)
    require_least(0, workers=settings.workers)
    if settings.resume and settings.results is None:
        raise UserError("--resume: needs --results, beside which the detections of a stopped run are kept")
    if settings.results is not None:
        for file in result_files(settings.results, settings.task).values():
            check_output_file(file, "--results", overwrite=settings.overwrite)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    found = evaluate_file(
        settings.model,
        settings.data,
        settings.task,
        split=settings.split,
        backend=settings.backend,
        device=settings.device,
        limit=settings.limit,
        batch_size=settings.batch_size,
        workers=settings.workers,
        skip_bad=settings.skip_bad,
        progress=settings.progress,
        categories=settings.categories,
        results=settings.results,
        resume=settings.resume,
        overwrite=settings.overwrite,
    )
    if not PartialState().is_main_process:
        return 0
    evaluation, files = found.evaluation, {}
    if settings.results is not None:
        files = write_results(settings.results, evaluation.results, found.dataset)
    if found.journal is not None:
        found.journal.remove()
    report = sys.stderr if str(settings.json) == "-" else sys.stdout  # '-' keeps stdout for the JSON
    for iou_type, path in files.items():
        print(f"{iou_type} results: {path}", file=report)
    print(f"{settings.model} on {found.images} images of {settings.data} ({settings.split})", file=report)
    print(metrics_table(settings.task, evaluation.metrics), file=report)
    figures = found.to_dict() | {"results": {iou_type: str(path) for iou_type, path in files.items()}}
    write_json(figures, settings.json)
    return 0

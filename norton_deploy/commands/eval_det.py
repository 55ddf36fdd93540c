"""Score a detector on COCO-2017 or data in its layout: a checkpoint, an ONNX graph or a TensorRT engine.

One process: tools/eval_det.py ...; several: torchrun --nproc_per_node=8 tools/eval_det.py ...
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from norton_deploy.commands import write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.coco import CocoDetection
from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import metrics_table, table3_scores
from norton_deploy.evaluation.detector_evaluation import evaluate_detector, write_results
from norton_deploy.files import check_output_file
from norton_deploy.inference.predictor import load_predictor
from norton_deploy.structures import Task


@dataclass(frozen=True)
class Settings:
    """Settings of tools/eval_det.py."""

    task: Task
    """box, mask or keypoint."""
    data: Path
    """Folder in COCO-2017's layout."""
    model: Path
    """Detector: a checkpoint (.safetensors), a graph (.onnx) or an engine (.engine)."""
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
    json: Path | None = None
    """Write the metrics as JSON to a file, or to stdout with '-'."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="eval_det", description=__doc__ or "")
    for name, value, least in (
        ("--batch-size", settings.batch_size, 1),
        ("--limit", settings.limit, 1),
        ("--workers", settings.workers, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name}: expected at least {least}, got {value}")
    check_output_file(settings.results, "--results")
    check_output_file(settings.json, "--json")
    use_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=use_cpu)
    device = settings.device or ("cpu" if use_cpu else str(state.device))
    predictor = load_predictor(settings.model, device=device)
    if predictor.task != settings.task:
        raise UserError(f"{settings.model}: a detector for task '{predictor.task}', --task is '{settings.task}'")
    dataset = CocoDetection(
        settings.data,
        settings.split,
        settings.task,
        categories=predictor.categories,
        skip_bad=settings.skip_bad,
    )
    evaluation = evaluate_detector(
        predictor,
        dataset,
        limit=settings.limit,
        batch_size=settings.batch_size,
        workers=settings.workers,
        progress=settings.progress,
    )
    if not state.is_main_process:
        return 0
    files = {} if settings.results is None else write_results(settings.results, evaluation.results, dataset)
    report = sys.stderr if str(settings.json) == "-" else sys.stdout  # '-' keeps stdout for the JSON
    for iou_type, path in files.items():
        print(f"{iou_type} results: {path}", file=report)
    images = len(dataset) if settings.limit is None else min(settings.limit, len(dataset))
    table = metrics_table(settings.task, evaluation.metrics)
    print(f"{settings.model} on {images} images of {settings.data} ({settings.split})\n{table}", file=report)
    average_precision, average_recall = table3_scores(settings.task, evaluation.metrics)
    write_json(
        {
            "task": settings.task,
            "model": str(settings.model),
            "backend": predictor.backend,
            "device": predictor.device,
            "images": images,
            "table3": {"AP": average_precision, "AR": average_recall},
            "metrics": evaluation.metrics,
            "results": {iou_type: str(path) for iou_type, path in files.items()},
        },
        settings.json,
    )
    return 0

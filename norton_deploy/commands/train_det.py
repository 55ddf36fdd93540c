"""Train Faster, Mask or Keypoint R-CNN on COCO-2017 or data in its layout.

One process: tools/train_det.py ...; eight GPUs: torchrun --nproc_per_node=8 tools/train_det.py ...
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from norton_deploy.commands import command_line, write_json
from norton_deploy.config import parse_settings
from norton_deploy.evaluation.coco_metrics import metrics_table
from norton_deploy.files import check_output_file
from norton_deploy.training.detector_training import DetectorTrainingSettings, train_detector
from norton_deploy.training.run_folder import RunFolder

FIRST = (
    "epochs",
    "steps",
    "init",
    "teacher",
    "batch-size",
    "lr-per-16-images",
    "precision",
    "resume",
    "overwrite",
    "workers",
)


@dataclass(frozen=True, kw_only=True)
class Settings(DetectorTrainingSettings):
    """Settings of tools/train_det.py."""

    json: Path | None = None
    """Write the final metrics as JSON to a file, or to stdout with '-'."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="train_det", description=__doc__ or "")
    check_output_file(settings.json, "--json", overwrite=settings.overwrite or settings.resume)
    result = train_detector(
        settings,
        command=command_line("train_det", argv),
        announce=lambda message: print(message, file=sys.stderr),
    )
    if PartialState().is_main_process:
        folder = RunFolder(settings.out)
        report = sys.stderr if str(settings.json) == "-" else sys.stdout  # '-' keeps stdout for the JSON
        print(metrics_table(settings.task, result.metrics), file=report)
        print(f"checkpoints: {folder.best} (best), {folder.last} (last)", file=report)
        figures = {"steps": result.steps, "metrics": result.metrics, "checkpoint": str(folder.best)}
        write_json(figures, settings.json)
    return 0

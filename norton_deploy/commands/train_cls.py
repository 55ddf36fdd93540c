"""Train a classifier on folders of images (CIFAR-10, ImageNet, crops of a detection dataset).

One process: tools/train_cls.py ...; eight GPUs: torchrun --nproc_per_node=8 tools/train_cls.py ...
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from norton_deploy.commands import command_line, write_json
from norton_deploy.config import parse_settings
from norton_deploy.files import check_output_file
from norton_deploy.training.classifier_training import ClassifierTrainingSettings, train_classifier
from norton_deploy.training.run_folder import RunFolder

FIRST = ("epochs", "steps", "init", "teacher", "arch", "image-size", "batch-size", "precision", "resume", "overwrite")


@dataclass(frozen=True, kw_only=True)
class Settings(ClassifierTrainingSettings):
    """Settings of tools/train_cls.py."""

    json: Path | None = None
    """Write the final metrics as JSON to a file, or to stdout with '-'."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="train_cls", description=__doc__ or "")
    check_output_file(settings.json, "--json", overwrite=settings.overwrite or settings.resume)
    result = train_classifier(
        settings, command=command_line("train_cls", argv), announce=lambda message: print(message, file=sys.stderr)
    )
    if PartialState().is_main_process:
        accuracy = result.metrics["classification"]
        folder = RunFolder(settings.out)
        report = sys.stderr if str(settings.json) == "-" else sys.stdout  # '-' keeps stdout for the JSON
        print(f"top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%}", file=report)
        print(f"checkpoints: {folder.best} (best), {folder.last} (last)", file=report)
        figures = {"steps": result.steps, "metrics": result.metrics, "checkpoint": str(folder.best)}
        write_json(figures, settings.json)
    return 0

"""Writes a torchvision Faster, Mask or Keypoint R-CNN with seeded random weights as a checkpoint, to try plans on.

Its normalisation and last layers are calibrated on images, so that it detects something: enough for time, MACs and
parameters; what harm a plan does to it says little about trained weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, save_checkpoint
from norton_deploy.checkpoints.open_model import published_categories
from norton_deploy.compression.random_detector import calibrate_random_detector
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import read_images
from norton_deploy.errors import UserError
from norton_deploy.models.detector_parts import BackboneSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/random_detector.py."""

    images: Path
    """Folder of images; the first two calibrate."""
    out: Path
    """Checkpoint to write (.safetensors)."""
    task: Task = "box"
    """box, mask or keypoint."""


def main() -> int:
    """Build, calibrate, save."""
    settings = parse_settings(Settings, prog="random_detector", description=__doc__ or "")
    torch.manual_seed(0)
    classes = 2 if settings.task == "keypoint" else 91
    shape = DetectorSettings(
        num_classes=classes, backbone=BackboneSettings(norm="batch"), roi=RoiSettings(score_threshold=0.0)
    )
    model = shape.build(settings.task)
    calibrate_random_detector(model, list(read_images(settings.images, 2)), shape)
    header = CheckpointHeader(settings.task, shape, None, published_categories(settings.task, classes))
    save_checkpoint(settings.out, model.eval(), header)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

"""Writes a torchvision Faster, Mask or Keypoint R-CNN with seeded random weights as a checkpoint, to try plans on.

Its normalisation and last layers are calibrated on drawn scenes, so that it detects something: enough for time, MACs
and parameters; what harm a plan does to it says little about trained weights.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.cells import run
from norton_deploy.checkpoints.checkpoint import CheckpointHeader, save_checkpoint
from norton_deploy.models.detector_parts import ImageSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.parity.export_checked import RANDOM_SIZE, open_detector
from norton_deploy.structures import Task


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/random_detector.py."""

    out: Path
    """Checkpoint to write (.safetensors)."""
    task: Task = "box"
    """box, mask or keypoint."""


def main(settings: Settings) -> None:
    """Build and save; the settings are those that `random_detector` builds by."""
    model, task, categories = open_detector(None, settings.task)
    image = ImageSettings(min_size=min(RANDOM_SIZE), max_size=max(RANDOM_SIZE))
    shape = DetectorSettings(num_classes=2 if task == "keypoint" else 91, image=image)
    save_checkpoint(settings.out, model, CheckpointHeader(task, shape, None, categories))


if __name__ == "__main__":
    run(Settings, main)

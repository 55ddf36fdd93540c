"""A tiny detector's training settings for the tests, as a command line; and a script for several processes.

`torchrun tiny_detector.py DATA OUT BATCH_SIZE` trains a detector that samples without chance.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from norton_deploy.commands import train_det
from norton_deploy.config import parse_settings
from norton_deploy.training import detector_training
from norton_deploy.training.detector_training import train_detector
from norton_deploy.training.trainer import Trainer

# Not under 75 px: torchvision's MultiScaleRoIAlign keeps the scales that it rounds from its first batch, and
# below that size they depend on that batch.
TINY_DETECTOR = """
    --detector.backbone.architecture resnet18 --detector.backbone.norm group --detector.backbone.trainable-layers 5
    --detector.image.min-size 80 --detector.image.max-size 128 --detector.backbone.fpn-channels 16
    --detector.roi.box-features 32 --detector.roi.mask-channels 16 --detector.roi.keypoint-channels 16
    --detector.rpn.anchor-sizes 8 16 32 48 64
    --detector.rpn.pre-nms 60 60 --detector.rpn.post-nms 40 40
    --detector.rpn.batch-per-image 16 --detector.roi.batch-per-image 16
"""
TINY_TRAINING = """
    --batch-size 2 --workers 0 --lr 0.02 --warmup-steps 2 --log-every 1 --no-progress --device cpu
"""


def tiny_arguments(data: Path, out: Path, task: str = "box", *more: str) -> list[str]:
    """Command line of a short run of train_det on `data`."""
    return [
        "--task",
        task,
        "--data",
        str(data),
        "--out",
        str(out),
        *TINY_TRAINING.split(),
        *TINY_DETECTOR.split(),
        *more,
    ]


class FirstSamples:
    """torchvision's sampler of anchors and proposals, without chance: the first so many of each kind."""

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        self.count, self.positives = batch_size_per_image, int(batch_size_per_image * positive_fraction)

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels in matched:
            positive = torch.where(labels >= 1)[0][: self.positives]
            negative = torch.where(labels == 0)[0][: self.count - len(positive)]
            assert len(positive) + len(negative) == self.count, "every image must yield its full sample"
            for masks, indices in zip(chosen, (positive, negative), strict=True):
                masks.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill(0, indices, 1))
        return chosen


class ChancelessTrainer(Trainer):
    """A trainer of a detector that samples without chance."""

    def __init__(self, *, model: Any, **others: Any) -> None:
        model.rpn.fg_bg_sampler = FirstSamples(16, 0.5)
        model.roi_heads.fg_bg_sampler = FirstSamples(16, 0.25)
        super().__init__(model=model, **others)


def train_without_chance(data: Path, out: Path, batch_size: int) -> None:
    """Four steps of a detector that samples without chance on unmirrored images, with EMA."""
    arguments = tiny_arguments(data, out, "box", "--steps", "4", "--batch-size", str(batch_size))
    arguments += ["--flip", "0", "--clip-norm", "1"]
    settings = parse_settings(train_det.Settings, arguments, prog="test", description="")
    train_detector(settings, command="test")


if __name__ == "__main__":
    torch.set_num_threads(1)
    detector_training.Trainer = ChancelessTrainer  # type: ignore[misc]  # a test double
    train_without_chance(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

"""Training transforms of detection images and their targets, seeded per image.

A transform takes (image [3, H, W] RGB, uint8 or float32 0..1, target, rng) and returns the new pair. All randomness
comes from `rng`, which `generator_for(seed, epoch, index)` makes, so an image's version depends on nothing
else: not on the number of workers, nor on what was loaded before, nor on whether training was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

Target = dict[str, Any]

# COCO's 17 keypoints after mirroring: left and right change places, the nose stays.
MIRRORED_KEYPOINTS = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
DetectionTransform = Callable[[Tensor, Target, np.random.Generator], tuple[Tensor, Target]]
"""Changes an image and its target together; all randomness from the generator."""


def generator_for(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of image `index` in an epoch."""
    return np.random.default_rng((seed, epoch, index))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Bytes 0..255 -> float32 0..1, as torchvision's detectors take them; floats stay as they are."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(255)


class Compose:
    """Several transforms, one after the other."""

    def __init__(self, transforms: Sequence[DetectionTransform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        for transform in self.transforms:
            image, target = transform(image, target, rng)
        return image, target


class RandomHorizontalFlip:
    """Mirror image, boxes, masks and keypoints; left and right keypoints change names."""

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        if rng.uniform() >= self.probability:
            return image, target
        width = image.shape[-1]
        target = dict(target)
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], dim=1)
        if "masks" in target:
            target["masks"] = target["masks"].flip(-1)
        if "keypoints" in target:
            points = target["keypoints"][:, list(MIRRORED_KEYPOINTS)].clone()
            points[..., 0] = torch.where(points[..., 2] > 0, width - points[..., 0], 0.0)
            target["keypoints"] = points
        return image.flip(-1), target


class PhotometricJitter:
    """Random brightness, contrast, saturation and hue, each applied half of the time, in float32."""

    def __init__(self, strength: float = 0.3, hue: float = 0.04) -> None:
        self.strength, self.hue = strength, hue

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        image = to_unit_range(image)
        applied = rng.uniform(size=4) < 0.5
        factors = rng.uniform(1.0 - self.strength, 1.0 + self.strength, size=3)
        shift = float(rng.uniform(-self.hue, self.hue))
        if applied[0]:
            image = F.adjust_brightness(image, float(factors[0]))
        if applied[1]:
            image = F.adjust_contrast(image, float(factors[1]))
        if applied[2]:
            image = F.adjust_saturation(image, float(factors[2]))
        if applied[3]:
            image = F.adjust_hue(image, shift)
        return image, target


def training_transform(*, flip: float = 0.5, photometric: bool = False) -> Compose:
    """The detection recipe; scale jitter is the detector's own (`ImageSettings.train_short_sides`).

    Args:
        flip: probability of mirroring.
        photometric: jitter brightness, contrast, saturation and hue.
    """
    steps: list[DetectionTransform] = [RandomHorizontalFlip(flip)]
    if photometric:
        steps.append(PhotometricJitter())
    return Compose(steps)

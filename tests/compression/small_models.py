"""Models of few channels, and pictures for them."""

import torch
from torch import Tensor

from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings

CLASSIFIER = ClassifierSettings("resnet18", 7, image_size=(32, 32))
DETECTOR = DetectorSettings(
    num_classes=4,
    backbone=BackboneSettings("resnet18", norm="batch", fpn_channels=16),
    roi=RoiSettings(box_features=32, mask_channels=(16, 16)),
    image=ImageSettings(64, 64),
)


def pictures(count: int, side: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, side, side, generator=generator) for _ in range(count)]

"""Dense or compressed models with random weights, from one builder each."""

from typing import cast

from torch import nn
from torchvision.models.detection import FasterRCNN

from norton_deploy.compression.compress import compress
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings, build_dense_classifier
from norton_deploy.models.detectors import DetectorSettings, build_dense_detector
from norton_deploy.structures import Task


def build_detector(
    task: Task, settings: DetectorSettings | None = None, plan: CompressionPlan | None = None
) -> FasterRCNN:
    """A Faster (box), Mask (mask) or Keypoint (keypoint) R-CNN, dense or compressed by `plan`.

    The weights are random; a compressed detector is a random dense one that went through `compress`.

    Raises:
        UserError: unknown task, impossible settings, or a plan that does not fit.
    """
    model = build_dense_detector(task, settings)
    return model if plan is None else cast(FasterRCNN, compress(model, plan, starts=1))


def build_classifier(settings: ClassifierSettings, plan: CompressionPlan | None = None) -> nn.Module:
    """A classifier with random weights, dense or compressed by `plan`.

    Raises:
        UserError: unknown architecture or a plan that does not fit.
    """
    model = build_dense_classifier(settings)
    return model if plan is None else compress(model, plan, starts=1)

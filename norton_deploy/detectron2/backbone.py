"""What the registered backbone of a Detectron2 configuration looks like: its settings and its plan."""

from dataclasses import replace

import numpy as np

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, read_header
from norton_deploy.compression.channel_groups import PYRAMID_GROUP
from norton_deploy.compression.compress import BODY
from norton_deploy.detectron2.config import Detectron2Config
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings

BACKBONE = "backbone."
RPN = "rpn.head.conv.0.0"
PIXEL_TOLERANCE = 1e-4
"""Of the pixels' mean and std, in units of 0..1."""


def backbone_structure(config: Detectron2Config) -> tuple[DetectorSettings, CompressionPlan | None]:
    """Settings of a detector whose backbone is the registered one, and the plan of that backbone.

    The plan stands in the file MODEL.NORTON.PLAN, or in the header of the checkpoint MODEL.NORTON.WEIGHTS. Only
    its backbone part (body and pyramid) holds: Detectron2 builds the heads.

    Returns:
        (settings, plan in a detector's names, or None when the backbone is dense).

    Raises:
        UserError: the configuration is of a model that cannot be expressed, or the two files contradict it or
            each other; the message says what to set.
    """
    settings = config.settings()
    file, weights = config["MODEL.NORTON.PLAN"], config["MODEL.NORTON.WEIGHTS"]
    header = read_header(weights) if weights else None
    if header is not None:
        settings = _settings_of(header, settings, config)
    own = None if header is None else header.plan
    if file and own is not None:
        raise UserError(
            f"{config.source}: MODEL.NORTON.PLAN is {file}, but {weights} is compressed already; leave PLAN empty"
        )
    plan = CompressionPlan.load(file) if file else own
    if plan is None or plan.architecture != "rcnn":
        return settings, None if plan is None else plan.with_prefix("rcnn", BODY)
    part = plan.within_prefix("rcnn", BACKBONE).with_prefix("rcnn", BACKBONE)
    if PYRAMID_GROUP in part.keep:
        # Detectron2's RPN is as wide as the pyramid that it reads.
        part = replace(part, keep={**part.keep, RPN: part.keep[PYRAMID_GROUP]})
    return settings, part


def _settings_of(header: CheckpointHeader, settings: DetectorSettings, config: Detectron2Config) -> DetectorSettings:
    """The settings with what only the checkpoint knows; what both know must agree."""
    path, architecture = config["MODEL.NORTON.WEIGHTS"], header.settings.architecture
    if architecture != settings.architecture:
        raise UserError(
            f"{config.source}: MODEL.RESNETS.DEPTH gives {settings.architecture}, but {path} is {architecture}"
        )
    pixels = header.classifier.pixels if header.task == "cls" else header.detector.image.pixels
    if not np.allclose(pixels, settings.image.pixels, rtol=0, atol=PIXEL_TOLERANCE):
        mean, std = ([round(255 * value, 3) for value in values] for values in pixels)
        raise UserError(
            f"{config.source}: the pixels' mean and std are not those of {path}; set INPUT.FORMAT: RGB, "
            f"MODEL.PIXEL_MEAN: {mean}, MODEL.PIXEL_STD: {std}"
        )
    if header.task == "cls":
        return settings
    found, expected = header.detector, settings.backbone
    if found.backbone.fpn_channels != expected.fpn_channels:
        raise UserError(
            f"{config.source}: MODEL.FPN.OUT_CHANNELS is {expected.fpn_channels}, but {path} has "
            f"{found.backbone.fpn_channels}"
        )
    return replace(
        settings,
        detectron2=replace(settings.detectron2, stride_in_1x1=found.detectron2.stride_in_1x1),
        backbone=replace(expected, norm_eps=found.backbone.norm_eps),
    )

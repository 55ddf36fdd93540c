"""A trained Detectron2 model as one of our checkpoints, and the structure of one with the registered backbone.

Detectron2 itself is not needed.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from norton_deploy.checkpoints.checkpoint import Checkpoint, CheckpointHeader, load_weights, read_header
from norton_deploy.checkpoints.open_model import published_categories
from norton_deploy.checkpoints.torchvision_weights import read_tensors
from norton_deploy.compression.channel_groups import PYRAMID_GROUP
from norton_deploy.compression.compress import apply_structure
from norton_deploy.compression.fit_plan import BODY
from norton_deploy.data.category_list import read_categories
from norton_deploy.detectron2.config import Detectron2Config, read_config
from norton_deploy.detectron2.pickle import read_pickle
from norton_deploy.detectron2.weights import convert_weights
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Categories, Task

BACKBONE = "backbone."
RPN = "rpn.head.conv.0.0"
PIXEL_TOLERANCE = 1e-4
"""Of the pixels' mean and std, in units of 0..1."""


def import_detectron2(config: str | Path, weights: str | Path, annotations: str | Path | None = None) -> Checkpoint:
    """Rebuild a Faster, Mask or Keypoint R-CNN R50-FPN of Detectron2 as one of our detectors.

    Args:
        config: its YAML file; `_BASE_` files are read too.
        weights: its .pkl (model zoo) or .pth.
        annotations: COCO annotation file of the data that it was trained on, for the names and ids of its
            categories; without it, 80 classes are COCO's, a keypoint detector's only class is COCO's person, and
            other classes are numbered.

    Returns:
        The model in evaluation mode and its header, without lineage.

    Raises:
        UserError: the configuration cannot be expressed, or the weights do not fit; the message names the first
            key that does not, or what in a pickle was refused.
    """
    parsed = read_config(config)
    settings, plan = backbone_structure(parsed) if parsed.is_norton else (parsed.settings(), None)
    task = parsed.task
    model = settings.build(task)
    if plan is not None:
        apply_structure(model, plan)
    converted = convert_weights(_read_weights(Path(weights)), model, parsed, str(weights))
    load_weights(model, converted, str(weights))
    categories = _categories(task, settings.num_classes, annotations)
    return Checkpoint(model.eval(), CheckpointHeader(task, settings, plan, categories))


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a .pkl or .pth file."""
    if path.suffix != ".pkl":
        return read_tensors(path)
    content = read_pickle(path)
    arrays: Any = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(arrays, dict) or not arrays:
        raise UserError(f"{path}: expected a mapping with the weights under 'model', as Detectron2's model zoo has")
    for key, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise UserError(f"{path}: the key '{key}' holds {type(array).__name__}, expected an array")
    return {str(key): torch.from_numpy(array) for key, array in arrays.items()}


def _categories(task: Task, num_classes: int, annotations: str | Path | None) -> Categories:
    """Labels 1..K in the order of Detectron2's classes, which is that of ascending category ids."""
    foreground = num_classes - 1
    labels = tuple(range(1, num_classes))
    if annotations is not None:
        entries = read_categories(annotations)
        ids, names = (tuple(entry[field] for entry in entries) for field in ("id", "name"))
    else:
        is_person = task == "keypoint" and foreground == 1
        coco = published_categories("keypoint", 2) if is_person else published_categories("box", 91)
        ids, names = coco.ids, coco.names
        if len(ids) != foreground:
            return Categories(labels, labels, tuple(f"class {label}" for label in labels))
    if len(ids) != foreground:
        raise UserError(f"{annotations}: has {len(ids)} categories, but the model has {foreground} classes")
    return Categories(labels, ids, names)


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

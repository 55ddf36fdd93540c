"""Detectron2's tensors in the names, order and channels of our detectors; every key is accounted for.

Three things differ beside names: Detectron2's classes have the background last (here it is label 0), its box and
mask predictors have no rows for it, and its stem usually reads BGR.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from norton_deploy.detectron2.config import Detectron2Config
from norton_deploy.errors import UserError

COUNTER = "num_batches_tracked"
PIXELS = {"pixel_mean": "MODEL.PIXEL_MEAN", "pixel_std": "MODEL.PIXEL_STD"}
CELL_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."
ANCHOR_TOLERANCE_PX = 1e-3


Conversion = Callable[[Tensor], Tensor]

# Parts of our names -> Detectron2's, one after the other.
_RENAMED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^backbone\.body\.layer(\d)", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}"),
    (r"^backbone\.body\.", "backbone.bottom_up.stem."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}"),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0", lambda m: f"backbone.fpn_output{int(m[1]) + 2}"),
    (r"^rpn\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv"),
    (r"^rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"^rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    (r"\.box_head\.fc6", ".box_head.fc1"),
    (r"\.box_head\.fc7", ".box_head.fc2"),
    (r"\.mask_head\.(\d+)\.0", lambda m: f".mask_head.mask_fcn{int(m[1]) + 1}"),
    (r"\.mask_predictor\.conv5_mask", ".mask_head.deconv"),
    (r"\.mask_predictor\.mask_fcn_logits", ".mask_head.predictor"),
    (r"\.keypoint_head\.(\d+)", lambda m: f".keypoint_head.conv_fcn{int(m[1]) // 2 + 1}"),
    (r"\.keypoint_predictor\.kps_score_lowres", ".keypoint_head.score_lowres"),
)


@dataclass(frozen=True)
class _Slot:
    """Where a Detectron2 tensor goes: our name, the shape that it must have, and what is done to it."""

    name: str
    shape: tuple[int, ...]
    convert: Conversion


def detectron2_name(name: str, *, own_backbone: bool = False) -> str:
    """Detectron2's name of one of our detector's tensors.

    Args:
        name: ours, "backbone.body.layer1.0.bn1.weight".
        own_backbone: the backbone is the one that this project registers, whose names are ours.
    """
    if own_backbone and name.startswith("backbone."):
        return name
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def convert_weights(
    tensors: Mapping[str, Tensor], model: nn.Module, config: Detectron2Config, source: str
) -> dict[str, Tensor]:
    """A Detectron2 state_dict as one of ours.

    Args:
        model: the detector that shall hold them; only its names and shapes are used.

    Returns:
        Our names -> float32 tensors, all that `model` has.

    Raises:
        UserError: a key is missing, unknown or of another shape; the message names the first.
    """
    slots = _slots(model, config)
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in PIXELS:
            _check_pixels(key, tensor, config, source)
        elif key.startswith(CELL_ANCHORS):
            _check_anchors(key, tensor, model, source)
        elif key not in slots:
            raise UserError(f"{source}: the key '{key}' has no place in {config.source} (task {config.task})")
        else:
            slot = slots[key]
            if tuple(tensor.shape) != slot.shape:
                raise UserError(f"{source}: key '{key}' has shape {tuple(tensor.shape)}, expected {slot.shape}")
            converted[slot.name] = slot.convert(tensor.float() if tensor.is_floating_point() else tensor)
    for key, slot in slots.items():
        # BatchNorm counts batches for training only; frozen layers do not.
        if slot.name not in converted and not key.endswith(COUNTER):
            raise UserError(f"{source}: the key '{key}' is missing; {config.source} (task {config.task}) needs it")
    return converted


def _slots(model: nn.Module, config: Detectron2Config) -> dict[str, _Slot]:
    """Detectron2's key -> its place, for every tensor of the model."""
    classes = config["MODEL.ROI_HEADS.NUM_CLASSES"]
    box_rows = 1 if config["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"] else classes
    mask_rows = 1 if config["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK"] else classes
    is_bgr = config["INPUT.FORMAT"] == "BGR"
    slots = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        convert: Conversion = _unchanged
        if name.startswith("backbone.body.conv1.") and is_bgr and len(shape) == 4 and shape[1] == 3:
            convert = swap_red_and_blue
        elif name.startswith("roi_heads.box_predictor.cls_score."):
            convert = _background_first
        elif name.startswith("roi_heads.box_predictor.bbox_pred."):
            shape, convert = (4 * box_rows, *shape[1:]), _with_background(4, classes // box_rows)
        elif name.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
            shape, convert = (mask_rows, *shape[1:]), _with_background(1, classes // mask_rows)
        slots[detectron2_name(name, own_backbone=config.is_norton)] = _Slot(name, shape, convert)
    return slots


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def swap_red_and_blue(weight: Tensor) -> Tensor:
    """A stem's weight [O, 3, Kh, Kw] for BGR images, as one for RGB images, or the other way round."""
    return weight.flip(1)


def _background_first(tensor: Tensor) -> Tensor:
    """[K + 1, ...] with the background's row moved from the end to the start."""
    return tensor.roll(1, 0)


def _with_background(rows: int, repeats: int) -> Conversion:
    """Adds a class's `rows` zero rows for the background in front, and repeats rows that all classes share."""

    def convert(tensor: Tensor) -> Tensor:
        classes = tensor.repeat(repeats, *(1 for _ in tensor.shape[1:]))
        return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), classes])

    return convert


def _check_pixels(key: str, tensor: Tensor, config: Detectron2Config, source: str) -> None:
    expected = torch.tensor(config[PIXELS[key]])
    if not torch.allclose(tensor.flatten().float(), expected, atol=1e-3):
        raise UserError(
            f"{source}: '{key}' is {tensor.flatten().tolist()}, but {PIXELS[key]} in {config.source} is "
            f"{expected.tolist()}; give the configuration that the model was trained with"
        )


def _check_anchors(key: str, tensor: Tensor, model: nn.Module, source: str) -> None:
    cells = cast(list[Tensor], model.get_submodule("rpn.anchor_generator").cell_anchors)
    level = int(key.removeprefix(CELL_ANCHORS))
    expected = cells[level] if level < len(cells) else torch.empty(0, 4)
    if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected, atol=ANCHOR_TOLERANCE_PX):
        raise UserError(
            f"{source}: '{key}' holds other anchors than MODEL.ANCHOR_GENERATOR gives; give the configuration that "
            "the model was trained with"
        )

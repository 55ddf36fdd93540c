"""Running a model's stages on fixed inputs, so that two models can be compared layer by layer.

Proposals and detections depend on the weights. Here the boxes are given, so that a dense model and its compressed
copy see the same regions and every difference between their tensors is a difference of their layers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from norton_deploy.compression.channel_groups import is_detector
from norton_deploy.models.detectors import ModelSettings

BATCH = 8
BOXES_PER_IMAGE = 64
HEAD_BOXES_PER_IMAGE = 16


@dataclass(frozen=True)
class Probe:
    """One batch of inputs.

    Attributes:
        pixels: float32 [B, 3, H, W], normalised, padded.
        image_sizes: (height, width) of each image inside the padding.
        boxes: float32 [K, 4] xyxy in pixels per image; empty for a classifier.
    """

    pixels: Tensor
    image_sizes: tuple[tuple[int, int], ...] = ()
    boxes: tuple[Tensor, ...] = ()


@torch.no_grad()
def make_probes(
    dense: nn.Module,
    images: Iterable[Tensor],
    settings: ModelSettings,
    *,
    batch: int = BATCH,
    boxes: int = BOXES_PER_IMAGE,
) -> Iterator[Probe]:
    """Batches of images, prepared as the model itself prepares them.

    Args:
        dense: in evaluation mode; a detector supplies its own best proposals as the boxes.
        images: float [3, H, W], 0..1 RGB, of any sizes.
        settings: of the model; a classifier's images are resized to its input size.
        batch: images per probe.
        boxes: proposals per image.
    """
    stream = iter(images)
    while part := list(islice(stream, batch)):
        prepared = settings.prepare(part)
        if not is_detector(dense):
            yield Probe(prepared.tensors)
            continue
        detector: Any = dense
        proposals, _ = detector.rpn(prepared, detector.backbone(prepared.tensors))
        sizes = tuple((int(height), int(width)) for height, width in prepared.image_sizes)
        yield Probe(prepared.tensors, sizes, tuple(found[:boxes].clone() for found in proposals))


def run_stages(model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    """The outputs by which a model is judged.

    Returns:
        A classifier's "logits" [B, classes]; a detector's "fpn.LEVEL" feature maps [B, C, H, W],
        "rpn_logits.LEVEL", "rpn_deltas.LEVEL", "class_logits" and "box_deltas" of all boxes, and "masks" or
        "heatmaps" of the first 16 boxes of each image.
    """
    if not is_detector(model):
        return {"logits": model(probe.pixels)}
    detector: Any = model
    maps = detector.backbone(probe.pixels)
    outputs = {f"fpn.{name}": value for name, value in maps.items()}
    logits, deltas = detector.rpn.head(list(maps.values()))
    for level, (score, delta) in enumerate(zip(logits, deltas, strict=True)):
        outputs |= {f"rpn_logits.{level}": score, f"rpn_deltas.{level}": delta}
    heads = detector.roi_heads
    sizes, boxes = list(probe.image_sizes), list(probe.boxes)
    few = [found[:HEAD_BOXES_PER_IMAGE] for found in boxes]
    features = heads.box_head(heads.box_roi_pool(maps, boxes, sizes))
    outputs["class_logits"], outputs["box_deltas"] = heads.box_predictor(features)
    if heads.has_mask():
        outputs["masks"] = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, few, sizes)))
    if heads.has_keypoint():
        pooled = heads.keypoint_head(heads.keypoint_roi_pool(maps, few, sizes))
        # Without the resizing after it, which adds numbers but no information.
        outputs["heatmaps"] = heads.keypoint_predictor.kps_score_lowres(pooled)
    return outputs

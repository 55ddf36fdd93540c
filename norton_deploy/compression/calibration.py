"""A few images through a model: its stages on fixed inputs, BatchNorm statistics, calibrated random detectors.

Proposals and detections depend on the weights. In a `Probe` the boxes are given, so that a dense model and its
compressed copy see the same regions and every difference between their tensors is a difference of their layers.

A freshly initialised detector overflows fp16 (its residual stream doubles at every block) and finds nothing (every
class scores 1 / classes). Both make an export look fine, or broken, for the wrong reason.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.channel_groups import is_detector
from norton_deploy.compression.compress import build_detector
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import ImageSettings
from norton_deploy.models.detectors import DetectorSettings, ModelSettings
from norton_deploy.structures import Task

PROBE_BATCH = 8
NORM_BATCH = 16
BOXES_PER_IMAGE = 64
HEAD_BOXES_PER_IMAGE = 16
LOGIT_SPREAD = 2.0
"""Standard deviation that objectness, class and mask logits are scaled to."""
BRANCH_GAIN = 0.25
"""Share of a residual branch beside its identity; with 1, rounding errors grow from block to block as in no
trained network, and the comparison with eager mode would measure that."""


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
    batch: int = PROBE_BATCH,
    boxes: int = BOXES_PER_IMAGE,
) -> Iterator[Probe]:
    """Batches of images, prepared as the model itself prepares them.

    Args:
        dense: in evaluation mode; a detector supplies its own best proposals as the boxes.
        images: float [3, H, W], 0..1 RGB, of any sizes.
        settings: of the model; a classifier's images are resized to its input size.
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


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, images: Iterable[Tensor], settings: ModelSettings) -> int:
    """Replace the mean and variance of every BatchNorm by their averages over `images`, in place.

    Frozen BatchNorm is re-estimated too and stays frozen. Of a detector only the backbone runs: its heads have no
    BatchNorm.

    Args:
        model: classifier or detector.
        images: float [3, H, W], 0..1 RGB, of any sizes; they are taken 16 at a time.
        settings: of the model; they prepare the images.

    Returns:
        The number of images used.

    Raises:
        UserError: there are no images.
    """
    was_training = model.training
    model.eval()
    frozen = {name: layer for name, layer in model.named_modules() if isinstance(layer, FrozenBatchNorm2d)}
    for name, layer in frozen.items():
        model.set_submodule(name, _thawed(layer))
    live = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in live]
    for layer in live:
        layer.reset_running_stats()
        layer.train()
    network = model.get_submodule("backbone") if is_detector(model) else model
    count = 0
    stream = iter(images)
    while batch := list(islice(stream, NORM_BATCH)):
        prepared = settings.prepare(batch)
        for layer in live:
            layer.momentum = len(batch) / (
                count + len(batch)
            )  # Every image counts alike, also those of the last batch.
        # The part that all images fill: the padding of the smaller ones would count as image.
        height, width = (min(sides) for sides in zip(*prepared.image_sizes, strict=True))
        network(prepared.tensors[:, :, :height, :width])
        count += len(batch)
    for layer, momentum in zip(live, momenta, strict=True):
        layer.momentum = momentum
    for name, layer in frozen.items():
        estimated = model.get_submodule(name)
        layer.running_mean.copy_(_tensor(estimated.running_mean))
        layer.running_var.copy_(_tensor(estimated.running_var))
        model.set_submodule(name, layer)
    model.train(was_training)
    if count == 0:
        raise UserError("BatchNorm re-estimation: no images were given")
    return count


def _thawed(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    """A live BatchNorm with the affine terms of a frozen one."""
    live = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps)
    live.weight.copy_(_tensor(frozen.weight))
    live.bias.copy_(_tensor(frozen.bias))
    return live.to(_tensor(frozen.weight).device)


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def random_detector(
    task: Task, image_size: tuple[int, int], plan: CompressionPlan | None = None, seed: int = 0
) -> FasterRCNN:
    """A detector with calibrated random weights, the same for a seed, for images of (height, width); in eval mode."""
    settings = DetectorSettings(image=ImageSettings(min_size=min(image_size), max_size=max(image_size)))
    settings = replace(settings, num_classes=2) if task == "keypoint" else settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_detector(task, settings, plan)
    scenes = [draw_scene(seed, image_size).image for seed in (1000, 1001)]
    pixels = [torch.from_numpy(scene).permute(2, 0, 1).to(torch.float32) / 255 for scene in scenes]
    calibrate_random_detector(model, pixels, settings)
    return model.eval()


@torch.no_grad()
def calibrate_random_detector(model: GeneralizedRCNN, images: Sequence[Tensor], settings: DetectorSettings) -> None:
    """Weaken residual branches, re-estimate BatchNorm and scale the last layers of the heads, in place.

    Args:
        model: a detector with random weights; left in eval mode.
        images: float [3, H, W], 0..1 RGB, one or more.
        settings: what the model was built from.
    """
    model.eval()
    for block in model.modules():
        if isinstance(block, Bottleneck | BasicBlock):
            norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            norm.weight.fill_(BRANCH_GAIN)
    reestimate_batch_norm(model, images, settings)
    batch, _ = model.transform(list(images))
    maps = model.backbone(batch.tensors)
    logits, _ = model.rpn.head(list(maps.values()))
    _scale(model.rpn.head.cls_logits, torch.cat([level.flatten() for level in logits]))
    proposals, _ = model.rpn(batch, maps)
    heads = model.roi_heads
    classes, _ = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, batch.image_sizes)))
    _scale(heads.box_predictor.cls_score, classes)
    if heads.has_mask():
        some = [part[:8] for part in proposals]
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, some, batch.image_sizes)))
        _scale(heads.mask_predictor.mask_fcn_logits, masks)


def _scale(layer: nn.Conv2d | nn.Linear, outputs: Tensor) -> None:
    """Scale a layer so that these outputs of its would have mean 0 and the spread `LOGIT_SPREAD`."""
    gain = LOGIT_SPREAD / float(outputs.std().clamp(min=1e-12))
    layer.weight.mul_(gain)
    if layer.bias is not None:
        layer.bias.sub_(outputs.mean()).mul_(gain)

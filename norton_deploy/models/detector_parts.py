"""The parts of a detector: what shapes each, and how it is built. The defaults are torchvision's (COCO, 800 x 1333)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import Bottleneck
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import _setup_scales

from norton_deploy.errors import UserError, shown
from norton_deploy.masks import MaskPaste
from norton_deploy.models.classifiers import LARGEST_SIDE, Norm, build_resnet
from norton_deploy.models.detectron2_layers import (
    DetectorTransform,
    ImageResize,
    KeypointScore,
    PyramidAnchorGenerator,
    PyramidRoIAlign,
)

STAGES = ("layer1", "layer2", "layer3", "layer4")
LEVELS = len(STAGES) + 1
"""Levels of the pyramid; RoIs are pooled from all but the last."""
SIZE_DIVISOR = 32
"""torchvision pads batches to multiples of this."""
LONGEST_LIST = 100
"""Numbers in a setting that takes several."""
FREEZING_ORDER = ("layer4", "layer3", "layer2", "layer1", "conv1")


@dataclass(frozen=True)
class Detectron2Settings:
    """What Detectron2 computes otherwise than torchvision; the defaults are torchvision's."""

    stride_in_1x1: bool = False
    """Bottlenecks stride in their first 1x1 convolution, as the original ResNet, not in their 3x3."""
    level_strides: tuple[int, ...] = ()
    """Pixels per cell of the five pyramid levels; empty: torchvision derives them from image sizes."""
    anchor_rounding: bool = True
    """Whether anchors have whole pixels."""
    anchor_offset: float = 0.0
    """Centre of the first anchor, in strides from the image's corner (needs level_strides)."""
    roi_align_aligned: bool = False
    """RoIAlign samples at true pixel centres, not half a cell beside them (needs level_strides)."""
    roi_sampling_ratio: int = 2
    """RoIAlign's samples per cell and axis; 0: one for each pixel of the feature map that the cell spans."""
    box_delta_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scale of the box head's regression deltas (dx, dy, dw, dh)."""
    proposal_min_size: float = 1e-3
    """Side in pixels below which a proposal is dropped."""
    image_resize: ImageResize = "torchvision"
    """How images are resized: torchvision's bilinear, or antialiased to 8 bits as Pillow does it."""
    mask_paste: MaskPaste = "whole_pixels"
    """Where masks land in the image: in boxes cut to whole pixels (torchvision), or at subpixel positions."""
    keypoint_score: KeypointScore = "logit"
    """Score of a keypoint: its heatmap's peak, or the probability of the peak among the heatmap's cells."""

    def __post_init__(self) -> None:
        if self.level_strides:
            require_range("detectron2", self, 1, LARGEST_SIDE, "level_strides")
        require_range("detectron2", self, 0, 1, "anchor_offset")
        require_range("detectron2", self, 0, 64, "roi_sampling_ratio")
        require_range("detectron2", self, 1e-3, 1e3, "box_delta_weights")
        require_range("detectron2", self, 0, LARGEST_SIDE, "proposal_min_size")
        if self.level_strides and len(self.level_strides) != LEVELS:
            raise UserError(
                f"detectron2.level_strides: expected one for each of {LEVELS} levels, got {len(self.level_strides)}"
            )
        for name in ("anchor_rounding", "anchor_offset", "roi_align_aligned"):
            value = getattr(self, name)
            if not self.level_strides and value != getattr(type(self), name):
                raise UserError(f"detectron2.{name} {value}: needs level_strides, for example 4 8 16 32 64")


@dataclass(frozen=True)
class BackboneSettings:
    """The ResNet and the feature pyramid on it."""

    architecture: str = "resnet50"
    """resnet18, resnet34, resnet50 or resnet101."""
    norm: Norm = "frozen"
    """Normalisation of the ResNet: frozen when it is pretrained; batch, sync or group otherwise."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation; torchvision's published detectors have 0."""
    trainable_layers: int = 3
    """How many stages are trained, counted from the last; 5 trains all."""
    zero_init_residual: bool = False
    """Start residual branches at zero; only sensible for training from nothing."""
    fpn_channels: int = 256
    """Width of the feature pyramid."""

    def __post_init__(self) -> None:
        require_positive("backbone", self, "fpn_channels")
        require_range("backbone", self, 0, 1, "norm_eps")
        if not 0 <= self.trainable_layers <= 5:
            raise UserError(f"backbone.trainable_layers: expected 0..5, got {self.trainable_layers}")
        if not self.architecture.startswith("resnet"):
            raise UserError(f"backbone '{self.architecture}': a detector needs a resnet")

    def build(self, *, stride_in_1x1: bool = False) -> BackboneWithFPN:
        """Body (the ResNet without its classification layer) and pyramid, as torchvision's detectors hold them."""
        network: Any = build_resnet(
            self.architecture, 1, norm=self.norm, norm_eps=self.norm_eps, zero_init_residual=self.zero_init_residual
        )
        if stride_in_1x1:
            for block in network.modules():
                if isinstance(block, Bottleneck):
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        widths = [network.inplanes >> doublings for doublings in (3, 2, 1, 0)]  # every stage has twice the channels
        outputs = {stage: str(index) for index, stage in enumerate(STAGES)}
        return BackboneWithFPN(network, outputs, widths, self.fpn_channels)


@dataclass(frozen=True)
class RpnSettings:
    """Anchors and proposals."""

    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor side in pixels at each of the five pyramid levels."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Anchor aspect ratios, height over width."""
    pre_nms: tuple[int, int] = (2000, 1000)
    """Proposals per level before NMS in training and in testing."""
    post_nms: tuple[int, int] = (2000, 1000)
    """Proposals per image after NMS in training and in testing."""
    nms_threshold: float = 0.7
    """IoU threshold of the NMS."""
    batch_per_image: int = 256
    """Anchors sampled per image for the loss."""

    def __post_init__(self) -> None:
        if len(self.anchor_sizes) != LEVELS:
            raise UserError(f"rpn.anchor_sizes: expected one for each of {LEVELS} levels, got {len(self.anchor_sizes)}")
        require_range("rpn", self, 1, LARGEST_SIDE, "anchor_sizes")
        require_range("rpn", self, 1e-3, 1e3, "anchor_ratios")
        require_positive("rpn", self, "pre_nms", "post_nms", "batch_per_image")
        require_range("rpn", self, 0, 1, "nms_threshold")

    def build_anchors(self, layers: Detectron2Settings) -> AnchorGenerator:
        """One anchor size and all ratios at each pyramid level."""
        sizes = tuple((size,) for size in self.anchor_sizes)
        ratios = (tuple(self.anchor_ratios),) * len(sizes)
        if not layers.level_strides:
            return AnchorGenerator(sizes, ratios)
        return PyramidAnchorGenerator(
            sizes, ratios, layers.level_strides, rounding=layers.anchor_rounding, offset=layers.anchor_offset
        )


@dataclass(frozen=True)
class RoiSettings:
    """The heads that look at proposals, and the detections that are kept."""

    canonical_scale: int = 224
    """Side in pixels of a RoI that is pooled from pyramid level 4 (P4)."""
    box_features: int = 1024
    """Width of the box head's two linear layers."""
    mask_channels: tuple[int, ...] = (256, 256, 256, 256)
    """Widths of the mask head's convolutions; the last is also the predictor's."""
    keypoint_channels: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512, 512)
    """Widths of the keypoint head's convolutions."""
    batch_per_image: int = 512
    """Proposals sampled per image for the box head's loss."""
    positive_fraction: float = 0.25
    """Largest share of positives among them."""
    score_threshold: float = 0.05
    """Detections below this score are dropped."""
    nms_threshold: float = 0.5
    """IoU threshold of the final, per-class NMS."""
    detections_per_image: int = 100
    """Detections kept per image, all classes together."""

    def __post_init__(self) -> None:
        sizes = ("box_features", "mask_channels", "keypoint_channels", "batch_per_image", "detections_per_image")
        require_positive("roi", self, "canonical_scale", *sizes)
        require_range("roi", self, 0, 1, "positive_fraction", "score_threshold", "nms_threshold")

    def build_pool(self, side: int, design_size: int, layers: Detectron2Settings) -> MultiScaleRoIAlign:
        """RoIAlign over the four pyramid levels that hold RoIs, to side x side cells.

        torchvision infers the levels' scales from the first batch that a detector sees, and in images of less than
        about 75 pixels gets another scale for level 5. A resumed or an exported detector sees another first batch, so
        the scales are inferred once, from an image of `design_size` pixels.
        """
        levels, samples = ["0", "1", "2", "3"], layers.roi_sampling_ratio
        if layers.level_strides:
            strides = layers.level_strides[: len(levels)]
            return PyramidRoIAlign(
                levels, side, samples, strides, aligned=layers.roi_align_aligned, canonical_scale=self.canonical_scale
            )
        pool = MultiScaleRoIAlign(levels, side, sampling_ratio=samples, canonical_scale=self.canonical_scale)
        with torch.device("cpu"):  # numbers, even in a model that is only built to see its shapes
            pool.scales, pool.map_levels = _setup_scales(
                _design_maps(design_size), [(design_size,) * 2], pool.canonical_scale, pool.canonical_level
            )
        return pool


@dataclass(frozen=True)
class ImageSettings:
    """How images are brought to the network."""

    min_size: int = 800
    """Images are resized so that their short side has this many pixels ..."""
    max_size: int = 1333
    """... unless their long side would exceed this many."""
    train_short_sides: tuple[int, ...] = ()
    """Further short sides among which training draws one per image (scale jitter)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the RGB channels, 0..1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels, 0..1."""

    def __post_init__(self) -> None:
        require_range("image", self, 1, LARGEST_SIDE, "min_size", "max_size")
        if self.train_short_sides:
            require_range("image", self, 1, LARGEST_SIDE, "train_short_sides")
        require_range("image", self, -100, 100, "mean")
        require_range("image", self, 1e-6, 100, "std")
        if self.min_size > self.max_size:
            raise UserError(f"image.min_size {self.min_size} is larger than max_size {self.max_size}")

    @property
    def pixels(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation."""
        return self.mean, self.std

    def build_transform(self, layers: Detectron2Settings) -> GeneralizedRCNNTransform:
        """What a detector does to images before the network, and to detections after it."""
        sides, mean, std = (*self.train_short_sides, self.min_size), list(self.mean), list(self.std)
        changes = {name: getattr(layers, name) for name in ("image_resize", "mask_paste", "keypoint_score")}
        if changes == {name: getattr(Detectron2Settings, name) for name in changes}:
            return GeneralizedRCNNTransform(sides, self.max_size, mean, std)
        return DetectorTransform(sides, self.max_size, mean, std, **changes)


def require_positive(group: str, settings: object, *names: str) -> None:
    """`require_range` from 1."""
    require_range(group, settings, 1, math.inf, *names)


def require_range(group: str, settings: object, low: float, high: float, *names: str) -> None:
    """Raises a UserError for the first of these fields that is not within low..high, or of a tuple's length not within
    1..`LONGEST_LIST`; `group` names their settings."""
    for name in names:
        value, where = getattr(settings, name), f"{group}.{name}" if group else name
        numbers = value if isinstance(value, tuple) else (value,)
        if not 1 <= len(numbers) <= LONGEST_LIST:
            raise UserError(f"{where}: expected 1 to {LONGEST_LIST} numbers, got {len(numbers)}")
        if not all(low <= number <= high for number in numbers):
            expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"{where}: expected {expected}, got {shown(value)}")


def freeze_stages(body: nn.Module, trainable_layers: int) -> None:
    """Stop gradients for all but the last `trainable_layers` parts of a ResNet body (5: none is frozen)."""
    trained = [*FREEZING_ORDER[:trainable_layers], *(["bn1"] if trainable_layers == 5 else [])]
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(any(name.startswith(stage) for stage in trained))


def _design_maps(side: int) -> list[Tensor]:
    """Empty pyramid levels 2 to 5 of an image of `side` pixels."""
    padded = math.ceil(side / SIZE_DIVISOR) * SIZE_DIVISOR
    return [torch.empty(1, 1, padded // stride, padded // stride, device="meta") for stride in (4, 8, 16, 32)]

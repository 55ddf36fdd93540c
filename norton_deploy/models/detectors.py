"""Faster, Mask and Keypoint R-CNN on torchvision's own classes, from explicit settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import Bottleneck
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import _setup_scales

from norton_deploy.errors import UserError
from norton_deploy.models.classifiers import build_resnet
from norton_deploy.models.image_transform import DetectorTransform, ImageResize, KeypointScore
from norton_deploy.models.keypoint_predictor import NormalisedKeypointPredictor
from norton_deploy.models.normalisation import Norm
from norton_deploy.models.pyramid_anchors import PyramidAnchorGenerator
from norton_deploy.models.pyramid_roi_align import PyramidRoIAlign
from norton_deploy.structures import TASKS, MaskPaste, ModelTask

STAGES = ("layer1", "layer2", "layer3", "layer4")
SIZE_DIVISOR = 32
"""torchvision pads batches to multiples of this."""
FREEZING_ORDER = ("layer4", "layer3", "layer2", "layer1", "conv1")


@dataclass(frozen=True)
class DetectorSettings:
    """Everything that shapes a detector, with torchvision's defaults (COCO, 800 x 1333)."""

    num_classes: int = 91
    """Number of classes, background included."""
    num_keypoints: int = 17
    """Keypoints of a person (task keypoint only)."""
    backbone: str = "resnet50"
    """ResNet in the backbone: resnet18, resnet34, resnet50 or resnet101."""
    norm: Norm = "frozen"
    """Normalisation of the backbone: frozen when it is pretrained; batch, sync or group otherwise."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation; torchvision's published detectors have 0."""
    trainable_layers: int = 3
    """How many backbone stages are trained, counted from the last; 5 trains all."""
    zero_init_residual: bool = False
    """Start residual branches at zero; only sensible for training from nothing."""
    fpn_channels: int = 256
    """Width of the feature pyramid."""
    box_features: int = 1024
    """Width of the box head's two linear layers."""
    mask_channels: tuple[int, ...] = (256, 256, 256, 256)
    """Widths of the mask head's convolutions; the last is also the predictor's."""
    keypoint_channels: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512, 512)
    """Widths of the keypoint head's convolutions."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor side in pixels at each of the five pyramid levels."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Anchor aspect ratios, height over width."""
    canonical_scale: int = 224
    """Side in pixels of a RoI that is pooled from pyramid level 4 (P4)."""
    min_size: int = 800
    """Images are resized so that their short side has this many pixels ..."""
    max_size: int = 1333
    """... unless their long side would exceed this many."""
    train_short_sides: tuple[int, ...] = ()
    """Further short sides among which training draws one per image (scale jitter)."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the RGB channels, 0..1."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels, 0..1."""
    rpn_pre_nms: tuple[int, int] = (2000, 1000)
    """Proposals per level before NMS in training and in testing."""
    rpn_post_nms: tuple[int, int] = (2000, 1000)
    """Proposals per image after NMS in training and in testing."""
    rpn_nms_threshold: float = 0.7
    """IoU threshold of the RPN's NMS."""
    rpn_batch_per_image: int = 256
    """Anchors sampled per image for the RPN's loss."""
    roi_batch_per_image: int = 512
    """Proposals sampled per image for the box head's loss."""
    roi_positive_fraction: float = 0.25
    """Largest share of positives among them."""
    score_threshold: float = 0.05
    """Detections below this score are dropped."""
    nms_threshold: float = 0.5
    """IoU threshold of the final, per-class NMS."""
    detections_per_image: int = 100
    """Detections kept per image, all classes together."""
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
        if self.num_classes < 2:
            raise UserError(f"num_classes: expected at least 2 (background counts), got {self.num_classes}")
        for name in ("num_keypoints", "fpn_channels", "box_features", "min_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.trainable_layers <= 5:
            raise UserError(f"trainable_layers: expected 0..5, got {self.trainable_layers}")
        if len(self.anchor_sizes) != len(STAGES) + 1:
            raise UserError(f"anchor_sizes: expected one for each of 5 levels, got {len(self.anchor_sizes)}")
        if not self.backbone.startswith("resnet"):
            raise UserError(f"backbone '{self.backbone}': a detector needs a resnet")
        if self.min_size > self.max_size:
            raise UserError(f"min_size {self.min_size} is larger than max_size {self.max_size}")
        if self.level_strides and len(self.level_strides) != len(self.anchor_sizes):
            raise UserError(f"level_strides: expected one for each of 5 levels, got {len(self.level_strides)}")
        for name in ("anchor_rounding", "anchor_offset", "roi_align_aligned"):
            if not self.level_strides and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{name} {getattr(self, name)}: needs level_strides, for example 4 8 16 32 64")

    @property
    def architecture(self) -> str:
        """The ResNet in the backbone."""
        return self.backbone

    @property
    def input_size(self) -> tuple[int, int]:
        """The (height, width) in pixels at which a model's complexity is stated."""
        return self.min_size, self.min_size

    @property
    def proposals(self) -> int:
        """Regions per image in testing."""
        return self.rpn_post_nms[1]

    def build(self, task: ModelTask) -> FasterRCNN:
        """A dense detector with random weights (`build_dense_detector`)."""
        return build_dense_detector(task, self)

    def prepare(self, images: Sequence[Tensor]) -> ImageList:
        """Images as the backbone takes them: resized, normalised, padded to one batch.

        Args:
            images: float [3, H, W], 0..1 RGB, of any sizes.

        Returns:
            `tensors` [N, 3, H, W]; `image_sizes`, the (height, width) of each image inside the padding.
        """
        prepared: ImageList = build_transform(self).eval()(list(images))[0]
        return prepared


def build_body(settings: DetectorSettings) -> nn.Module:
    """The ResNet of the settings without its classification layer, as torchvision's detectors hold it.

    Its outputs are the four stages, named "0" to "3".
    """
    network = build_resnet(
        settings.backbone,
        1,
        norm=settings.norm,
        norm_eps=settings.norm_eps,
        zero_init_residual=settings.zero_init_residual,
    )
    if settings.stride_in_1x1:
        for block in network.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return IntermediateLayerGetter(network, {stage: str(index) for index, stage in enumerate(STAGES)})


def build_dense_detector(task: ModelTask, settings: DetectorSettings | None = None) -> FasterRCNN:
    """A dense detector with random weights.

    Args:
        task: box (Faster R-CNN), mask (Mask R-CNN) or keypoint (Keypoint R-CNN).
        settings: defaults to torchvision's.

    Returns:
        A torchvision detector: in training mode (images, targets) -> losses; in evaluation mode images, a list
        of float [3, H, W] in 0..1 RGB, -> list of dicts with boxes (xyxy, pixels), labels, scores and
        masks or keypoints.

    Raises:
        UserError: unknown task or impossible settings.
    """
    if task not in TASKS:
        raise UserError(f"task '{task}': expected one of {', '.join(TASKS)}")
    s = settings or DetectorSettings()
    body = build_body(s)
    widths = _stage_widths(body)
    backbone = BackboneWithFPN(nn.Module(), {}, widths, s.fpn_channels)
    backbone.body = body
    anchors = _anchors(s)
    options: dict[str, object] = {
        "num_classes": None,
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(s.fpn_channels, anchors.num_anchors_per_location()[0]),
        "rpn_pre_nms_top_n_train": s.rpn_pre_nms[0],
        "rpn_pre_nms_top_n_test": s.rpn_pre_nms[1],
        "rpn_post_nms_top_n_train": s.rpn_post_nms[0],
        "rpn_post_nms_top_n_test": s.rpn_post_nms[1],
        "rpn_nms_thresh": s.rpn_nms_threshold,
        "rpn_batch_size_per_image": s.rpn_batch_per_image,
        "box_batch_size_per_image": s.roi_batch_per_image,
        "box_positive_fraction": s.roi_positive_fraction,
        "box_roi_pool": _pool(s, 7),
        "box_head": TwoMLPHead(s.fpn_channels * 7 * 7, s.box_features),
        "box_predictor": FastRCNNPredictor(s.box_features, s.num_classes),
        "box_score_thresh": s.score_threshold,
        "box_nms_thresh": s.nms_threshold,
        "box_detections_per_img": s.detections_per_image,
        "bbox_reg_weights": s.box_delta_weights,
    }
    if task == "box":
        model = FasterRCNN(backbone, **options)
    elif task == "mask":
        model = MaskRCNN(
            backbone,
            **options,
            mask_roi_pool=_pool(s, 14),
            mask_head=MaskRCNNHeads(s.fpn_channels, list(s.mask_channels), 1),
            mask_predictor=MaskRCNNPredictor(s.mask_channels[-1], s.mask_channels[-1], s.num_classes),
        )
    else:
        by_probability = s.keypoint_score == "probability"
        keypoint_predictor = NormalisedKeypointPredictor if by_probability else KeypointRCNNPredictor
        model = KeypointRCNN(
            backbone,
            **options,
            keypoint_roi_pool=_pool(s, 14),
            keypoint_head=KeypointRCNNHeads(s.fpn_channels, list(s.keypoint_channels)),
            keypoint_predictor=keypoint_predictor(s.keypoint_channels[-1], s.num_keypoints),
        )
    model.rpn.min_size = s.proposal_min_size
    model.transform = build_transform(s)
    freeze_stages(body, s.trainable_layers)
    return model


def build_transform(s: DetectorSettings) -> GeneralizedRCNNTransform:
    """What a detector does to images before the network, and to detections after it."""
    sides = (*s.train_short_sides, s.min_size)
    pixels = list(s.image_mean), list(s.image_std)
    if (s.image_resize, s.mask_paste, s.keypoint_score) == ("torchvision", "whole_pixels", "logit"):
        return GeneralizedRCNNTransform(sides, s.max_size, *pixels)
    return DetectorTransform(
        sides,
        s.max_size,
        *pixels,
        image_resize=s.image_resize,
        mask_paste=s.mask_paste,
        keypoint_score=s.keypoint_score,
    )


def freeze_stages(body: nn.Module, trainable_layers: int) -> None:
    """Stop gradients for all but the last `trainable_layers` parts of a ResNet body (5: none is frozen)."""
    trained = [*FREEZING_ORDER[:trainable_layers], *(["bn1"] if trainable_layers == 5 else [])]
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(any(name.startswith(stage) for stage in trained))


def _anchors(settings: DetectorSettings) -> AnchorGenerator:
    """One anchor size and all ratios at each pyramid level."""
    sizes = tuple((size,) for size in settings.anchor_sizes)
    ratios = (tuple(settings.anchor_ratios),) * len(sizes)
    if not settings.level_strides:
        return AnchorGenerator(sizes, ratios)
    return PyramidAnchorGenerator(
        sizes, ratios, settings.level_strides, rounding=settings.anchor_rounding, offset=settings.anchor_offset
    )


def _pool(settings: DetectorSettings, side: int) -> MultiScaleRoIAlign:
    """RoIAlign over the four pyramid levels that hold RoIs, to side x side cells."""
    levels = ["0", "1", "2", "3"]
    scale, samples = settings.canonical_scale, settings.roi_sampling_ratio
    if not settings.level_strides:
        pool = MultiScaleRoIAlign(levels, side, sampling_ratio=samples, canonical_scale=scale)
        pool.scales, pool.map_levels = _setup_scales(
            _design_maps(settings.min_size), [(settings.min_size,) * 2], pool.canonical_scale, pool.canonical_level
        )
        return pool
    strides = settings.level_strides[: len(levels)]
    return PyramidRoIAlign(levels, side, samples, strides, aligned=settings.roi_align_aligned, canonical_scale=scale)


def _design_maps(side: int) -> list[Tensor]:
    """Empty pyramid levels 2 to 5 of an image of `side` pixels.

    torchvision infers the levels' scales from the first batch that a detector sees, and in images of less than
    about 75 pixels gets another scale for level 5. A resumed or an exported detector sees another first batch, so
    the scales are inferred once, at the size that the detector is made for.
    """
    padded = math.ceil(side / SIZE_DIVISOR) * SIZE_DIVISOR
    return [torch.empty(1, 1, padded // stride, padded // stride, device="meta") for stride in (4, 8, 16, 32)]


def _stage_widths(body: nn.Module) -> list[int]:
    """Output channels of layer1..layer4."""
    widths = []
    for stage in STAGES:
        last_block = list(body.get_submodule(stage).children())[-1]
        last_conv = [layer for layer in last_block.children() if isinstance(layer, nn.Conv2d)][-1]
        widths.append(last_conv.out_channels)
    return widths

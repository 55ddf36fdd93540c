"""A torchvision Faster, Mask or Keypoint R-CNN as one graph of fixed shapes, the same detections as in eager mode.

Batch, image size and detection count are fixed; anchors, widths, thresholds, counts and class number are the
model's own. No operator's output shape depends on data (the `onnxruntime` target hides one inside its NMS).
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import MultiScaleRoIAlign

from norton_deploy.errors import UserError, require_least
from norton_deploy.export.contract import InputDtype, Target
from norton_deploy.export.frame_resize import FrameResize
from norton_deploy.export.static_boxes import DEFAULT_ITERATIONS, StaticNMS
from norton_deploy.export.static_heads import UP_SCALE, StaticBoxHead, StaticKeypointHead, StaticMaskHead
from norton_deploy.export.static_roi_align import StaticRoIAlign
from norton_deploy.export.static_rpn import StaticRPN
from norton_deploy.masks import MaskPaste
from norton_deploy.models.detectron2_layers import DetectorTransform
from norton_deploy.structures import Task

TARGETS: tuple[Target, ...] = get_args(Target)
TENSORRT_LARGEST_TOPK = 3840


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """What the graph of a detector shall be."""

    input_size: tuple[int, int] | None = None
    """Height and width of the camera's frames: the graph letterboxes them into --image-size itself, takes no other
    size, and gives boxes in their pixels."""
    batch: int = 1
    """Images per run."""
    max_detections: int | None = None
    """Detections per image; by default the model's own number."""
    candidates: int = 1024
    """(Proposal, class) pairs that are decoded per image; an output says when they were too few."""
    nms_iterations: int = DEFAULT_ITERATIONS
    """Unrolled NMS steps of the tensorrt target; an output says when they were too few."""
    input_dtype: InputDtype = "uint8"
    """uint8 [B, H, W, 3] RGB, or float32 [B, 3, H, W] RGB in 0..1."""
    target: Target = "onnxruntime"
    """onnxruntime: with ONNX's NonMaxSuppression; tensorrt: standard operators of fixed shape only."""


@dataclass(frozen=True)
class GraphSettings(GraphOptions):
    """What a static graph is built for; `image_size` (height, width) is what the detector sees."""

    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"target: '{self.target}' is none of {', '.join(TARGETS)}")
        require_least(1, image_size=min(self.image_size), batch=self.batch, max_detections=self.max_detections)
        require_least(1, candidates=self.candidates, nms_iterations=self.nms_iterations)
        if self.input_dtype not in ("uint8", "float32"):
            raise UserError(f"input_dtype: '{self.input_dtype}' is none of uint8, float32")
        if self.input_size is not None and self.input_dtype != "uint8":
            raise UserError(f"input_size: frames are resized as uint8, but input_dtype is '{self.input_dtype}'")


def task_of(model: GeneralizedRCNN) -> Task:
    """What a detector's heads find."""
    return "mask" if model.roi_heads.has_mask() else "keypoint" if model.roi_heads.has_keypoint() else "box"


def mask_paste_of(model: GeneralizedRCNN) -> MaskPaste:
    """How a detector's masks come into the image."""
    return model.transform.mask_paste if isinstance(model.transform, DetectorTransform) else "whole_pixels"


class StaticRCNN(nn.Module):
    """The whole detector, from pixels to padded detections.

    It shares the layers of the model it is made from, so give it a copy that may be changed
    (`norton_deploy.compression.lowering.lower_model` returns one).

    Attributes:
        task: box, mask or keypoint.
        padded_size: (height, width) after padding to the model's size divisor.
        mask_paste: how its masks come into the image.
    """

    scale: Tensor
    shift: Tensor
    to_frame: Tensor
    point_to_frame: Tensor

    def __init__(self, model: GeneralizedRCNN, settings: GraphSettings) -> None:
        """
        Raises:
            UserError: the model is in training mode or is not one of torchvision's three detectors, or the
                settings do not suit the target.
        """
        super().__init__()
        if model.training:
            raise UserError("the detector is in training mode; call .eval() before making a static graph")
        heads, transform = model.roi_heads, model.transform
        self.settings = settings
        self.task = task_of(model)
        self.max_detections = settings.max_detections or int(heads.detections_per_img)
        height, width = settings.image_size
        divisor = int(transform.size_divisible)
        self.padded_size = (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
        std = torch.tensor(transform.image_std, dtype=torch.float32)
        pixel = 255.0 if settings.input_dtype == "uint8" else 1.0
        self.register_buffer("scale", 1.0 / (pixel * std), persistent=False)
        self.register_buffer("shift", -torch.tensor(transform.image_mean, dtype=torch.float32) / std, persistent=False)
        self.compute_dtype = torch.float32
        self.resize: FrameResize | None = None
        if settings.input_size is not None:
            self.resize = FrameResize(settings.input_size, settings.image_size)
            x_factor, y_factor = self.resize.letterbox.factors
            self.register_buffer("to_frame", torch.tensor([x_factor, y_factor] * 2), persistent=False)
            self.register_buffer("point_to_frame", torch.tensor([x_factor, y_factor, 1.0]), persistent=False)
        self.mask_paste = mask_paste_of(model)

        self.backbone = model.backbone
        with torch.no_grad():
            device = next(model.parameters()).device
            probe = self.features(torch.zeros(1, 3, *self.padded_size, device=device))[1]
        sizes = {name: cast(tuple[int, int], tuple(value.shape[-2:])) for name, value in probe.items()}
        nms = StaticNMS(settings.target == "onnxruntime", settings.nms_iterations)
        self.rpn = StaticRPN(model.rpn, list(sizes.values()), settings.image_size, self.padded_size, nms)
        self.box_pool = self.roi_align(heads.box_roi_pool, sizes)
        self.box_head = StaticBoxHead(
            heads,
            self.box_pool.output_size,
            settings.image_size,
            self.max_detections,
            settings.candidates,
            nms,
        )
        if self.task == "mask":
            self.task_pool = self.roi_align(heads.mask_roi_pool, sizes)
            self.mask_head = StaticMaskHead(heads)
        elif self.task == "keypoint":
            self.task_pool = self.roi_align(heads.keypoint_roi_pool, sizes)
            map_size = UP_SCALE * self.task_pool.output_size[0]
            self.keypoint_head = StaticKeypointHead(heads, settings.image_size, map_size)
        self.check_topk()
        self.eval().requires_grad_(False)

    def roi_align(self, pooler: nn.Module, sizes: dict[str, tuple[int, int]]) -> StaticRoIAlign:
        """The static form of one of the model's poolers."""
        if not isinstance(pooler, MultiScaleRoIAlign):
            raise UserError(f"RoI pooling: expected torchvision's MultiScaleRoIAlign, found {type(pooler).__name__}")
        return StaticRoIAlign(pooler, sizes, self.settings.image_size)

    def check_topk(self) -> None:
        """TensorRT's TopK takes at most 3840 entries."""
        if self.settings.target != "tensorrt":
            return
        counts = {
            "rpn_pre_nms_top_n_test": self.rpn.rows,
            "rpn_post_nms_top_n_test": self.rpn.proposals,
            "candidates": self.settings.candidates,
            "max_detections": self.max_detections,
        }
        for name, count in counts.items():
            if count > TENSORRT_LARGEST_TOPK:
                raise UserError(f"{name}: {count}, but TensorRT's TopK takes at most {TENSORRT_LARGEST_TOPK}")

    def preprocess(self, images: Tensor) -> Tensor:
        """Pixels of `image_size` -> normalised, zero-padded [B, 3, H', W'] in the compute type."""
        height, width = self.settings.image_size
        if self.settings.input_dtype == "uint8":
            normalised = (images.to(torch.float32) * self.scale + self.shift).permute(0, 3, 1, 2)
        else:
            normalised = images * self.scale[:, None, None] + self.shift[:, None, None]
        bottom, right = self.padded_size[0] - height, self.padded_size[1] - width
        if bottom or right:
            normalised = nn.functional.pad(normalised, (0, right, 0, bottom))
        return normalised.to(self.compute_dtype)

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Feature maps of the body and of the pyramid, by name; both the same for a backbone without one."""
        if isinstance(self.backbone, BackboneWithFPN):
            body = self.backbone.body(images)
            return body, self.backbone.fpn(OrderedDict(body))
        maps = self.backbone(images)
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        return maps, maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: uint8 [B, H, W, 3] RGB or float32 [B, 3, H, W] RGB 0..1, as `input_dtype` says, of `image_size`
                or `input_size`.

        Returns:
            num_detections int32 [B]; boxes float32 [B, D, 4] xyxy in pixels of the input, not clipped to a resized
            frame; scores float32 [B, D] falling; labels int32 [B, D]; masks float32 [B, D, M, M] (box-local
            probabilities) or keypoints float32 [B, D, K, 3] (x, y, score); all zero in padded rows. nms_converged
            and candidates_complete, bool [1]: whether the graph's two shortcuts were exact for these images.
        """
        return self.outputs_and_stages(images)[0]

    def outputs_and_stages(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outputs, and the tensors between the stages that the parity check compares."""
        batch = self.settings.batch
        stages = {}
        if self.resize is not None:
            images = stages["canvas"] = self.resize(images)
        body, maps = self.features(self.preprocess(images))
        stages |= {f"body.{name}": value for name, value in body.items()}
        stages |= {f"fpn.{name}": value for name, value in maps.items()}

        rpn_logits, rpn_deltas = self.rpn.head(list(maps.values()))
        for level, (logits, deltas) in enumerate(zip(rpn_logits, rpn_deltas, strict=True)):
            stages |= {f"rpn_logits.{level}": logits, f"rpn_deltas.{level}": deltas}
        proposals, proposal_valid, rpn_converged = self.rpn.select(rpn_logits, rpn_deltas)
        stages |= {"proposals": proposals, "proposal_valid": proposal_valid}

        class_logits, box_deltas = self.box_head(self.box_pool(maps, proposals))
        stages |= {"class_logits": class_logits, "box_deltas": box_deltas}
        boxes, scores, labels, box_converged, complete = self.box_head.detections(
            class_logits, box_deltas, proposals, proposal_valid
        )
        outputs = {
            "num_detections": (labels > 0).to(torch.int32).sum(dim=1, dtype=torch.int32),
            "boxes": boxes,
            "scores": scores,
            "labels": labels.to(torch.int32),
        }
        found = (labels > 0).to(torch.float32)[:, :, None, None]
        if self.task == "mask":
            masks = self.mask_head(self.task_pool(maps, boxes), labels.reshape(-1))
            outputs["masks"] = masks.reshape(batch, self.max_detections, *masks.shape[1:]) * found
        elif self.task == "keypoint":
            point_maps = self.keypoint_head(self.task_pool(maps, boxes))
            stages["heatmaps"] = point_maps
            keypoints = self.keypoint_head.keypoints(point_maps, boxes.reshape(-1, 4))
            outputs["keypoints"] = keypoints.reshape(batch, self.max_detections, -1, 3) * found
        if self.resize is not None:
            stages["canvas_boxes"] = boxes
            outputs["boxes"] = boxes * self.to_frame
            if self.task == "keypoint":
                stages["canvas_keypoints"] = outputs["keypoints"]
                outputs["keypoints"] = outputs["keypoints"] * self.point_to_frame
        outputs["nms_converged"] = (rpn_converged & box_converged).reshape(1)
        outputs["candidates_complete"] = complete.reshape(1)
        return outputs, stages

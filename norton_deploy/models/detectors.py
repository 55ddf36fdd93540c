"""Faster, Mask and Keypoint R-CNN on torchvision's own classes, from explicit settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from norton_deploy.errors import UserError, shown
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import (
    BackboneSettings,
    Detectron2Settings,
    ImageSettings,
    RoiSettings,
    RpnSettings,
    freeze_stages,
    require_positive,
)
from norton_deploy.models.detectron2_layers import NormalisedKeypointPredictor
from norton_deploy.structures import LARGEST_LABEL, TASKS, ModelTask


@dataclass(frozen=True)
class DetectorSettings:
    """Everything that shapes a detector, with torchvision's defaults (COCO, 800 x 1333)."""

    num_classes: int = 91
    """Number of classes, background included."""
    num_keypoints: int = 17
    """Keypoints of a person (task keypoint only)."""
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    """The ResNet and the feature pyramid."""
    rpn: RpnSettings = field(default_factory=RpnSettings)
    """Anchors and proposals."""
    roi: RoiSettings = field(default_factory=RoiSettings)
    """The heads and the detections that are kept."""
    image: ImageSettings = field(default_factory=ImageSettings)
    """How images are brought to the network."""
    detectron2: Detectron2Settings = field(default_factory=Detectron2Settings)
    """What Detectron2 computes otherwise than torchvision."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= LARGEST_LABEL:
            found = shown(self.num_classes)
            raise UserError(
                f"num_classes: expected at least 2 (background counts), at most {LARGEST_LABEL}, got {found}"
            )
        require_positive("", self, "num_keypoints")

    @property
    def architecture(self) -> str:
        """The ResNet in the backbone."""
        return self.backbone.architecture

    @property
    def input_size(self) -> tuple[int, int]:
        """The (height, width) in pixels at which a model's complexity is stated."""
        return self.image.min_size, self.image.min_size

    @property
    def proposals(self) -> int:
        """Regions per image in testing."""
        return self.rpn.post_nms[1]

    def with_short_side(self, side: int) -> DetectorSettings:
        """The same detector for images whose short side has at most `side` pixels: smaller is faster."""
        own = self.image
        if side >= own.min_size:
            return self
        return replace(self, image=replace(own, min_size=side, max_size=side * own.max_size // own.min_size))

    def prepare(self, images: Sequence[Tensor]) -> ImageList:
        """Images as the backbone takes them: resized, normalised, padded to one batch.

        Args:
            images: float [3, H, W], 0..1 RGB, of any sizes.

        Returns:
            `tensors` [N, 3, H, W]; `image_sizes`, the (height, width) of each image inside the padding.
        """
        prepared: ImageList = self.image.build_transform(self.detectron2).eval()(list(images))[0]
        return prepared

    def build(self, task: ModelTask) -> FasterRCNN:
        """A dense detector with random weights.

        Args:
            task: box (Faster R-CNN), mask (Mask R-CNN) or keypoint (Keypoint R-CNN).

        Returns:
            A torchvision detector: in training mode (images, targets) -> losses; in evaluation mode images, a list
            of float [3, H, W] in 0..1 RGB, -> list of dicts with boxes (xyxy, pixels), labels, scores and
            masks or keypoints.

        Raises:
            UserError: unknown task.
        """
        if task not in TASKS:
            raise UserError(f"task '{task}': expected one of {', '.join(TASKS)}")
        layers, rpn, roi, width = self.detectron2, self.rpn, self.roi, self.backbone.fpn_channels
        backbone, anchors = self.backbone.build(stride_in_1x1=layers.stride_in_1x1), rpn.build_anchors(layers)
        options: dict[str, object] = {
            "num_classes": None,
            "rpn_anchor_generator": anchors,
            "rpn_head": RPNHead(width, anchors.num_anchors_per_location()[0]),
            "rpn_pre_nms_top_n_train": rpn.pre_nms[0],
            "rpn_pre_nms_top_n_test": rpn.pre_nms[1],
            "rpn_post_nms_top_n_train": rpn.post_nms[0],
            "rpn_post_nms_top_n_test": rpn.post_nms[1],
            "rpn_nms_thresh": rpn.nms_threshold,
            "rpn_batch_size_per_image": rpn.batch_per_image,
            "box_batch_size_per_image": roi.batch_per_image,
            "box_positive_fraction": roi.positive_fraction,
            "box_roi_pool": roi.build_pool(7, self.image.min_size, layers),
            "box_head": TwoMLPHead(width * 7 * 7, roi.box_features),
            "box_predictor": FastRCNNPredictor(roi.box_features, self.num_classes),
            "box_score_thresh": roi.score_threshold,
            "box_nms_thresh": roi.nms_threshold,
            "box_detections_per_img": roi.detections_per_image,
            "bbox_reg_weights": layers.box_delta_weights,
        }
        if task == "box":
            model = FasterRCNN(backbone, **options)
        elif task == "mask":
            last = roi.mask_channels[-1]
            model = MaskRCNN(
                backbone,
                **options,
                mask_roi_pool=roi.build_pool(14, self.image.min_size, layers),
                mask_head=MaskRCNNHeads(width, list(roi.mask_channels), 1),
                mask_predictor=MaskRCNNPredictor(last, last, self.num_classes),
            )
        else:
            by_probability = layers.keypoint_score == "probability"
            keypoint_predictor = NormalisedKeypointPredictor if by_probability else KeypointRCNNPredictor
            model = KeypointRCNN(
                backbone,
                **options,
                keypoint_roi_pool=roi.build_pool(14, self.image.min_size, layers),
                keypoint_head=KeypointRCNNHeads(width, list(roi.keypoint_channels)),
                keypoint_predictor=keypoint_predictor(roi.keypoint_channels[-1], self.num_keypoints),
            )
        model.rpn.min_size = layers.proposal_min_size
        model.transform = self.image.build_transform(layers)
        freeze_stages(model.backbone.body, self.backbone.trainable_layers)
        return model


ModelSettings = ClassifierSettings | DetectorSettings

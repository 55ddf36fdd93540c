"""Each stage of a torchvision detector in eager mode, computed from the exported graph's own input to that stage.

Because every stage starts from the graph's tensors, an error shows in the stage that makes it and nowhere after.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import concat_box_prediction_layers

from norton_deploy.data.transforms import to_unit_range
from norton_deploy.export.static_rcnn import task_of
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.models.detectron2_layers import NormalisedKeypointPredictor
from norton_deploy.parity.comparison import Arrays
from norton_deploy.parity.references import Reference, thinned
from norton_deploy.parity.report import Tolerances
from norton_deploy.structures import Categories, Detections

MASK_THRESHOLD = 0.5
"""A pixel of a higher probability belongs to the object, as in `paste_masks`."""
MOVES = ((0, 0, 0, 0), (1, 1, 1, 1), (-1, -1, -1, -1), (-1, -1, 1, 1), (1, 1, -1, -1))
"""Of a box's corners, as far as boxes may differ: not at all, both ways, larger and smaller."""


def without_resize(model: GeneralizedRCNN, image_size: tuple[int, int], max_detections: int) -> GeneralizedRCNN:
    """A copy, sharing nothing, that takes images of `image_size` as they are and keeps `max_detections`."""
    reference = copy.deepcopy(model)
    reference.transform.min_size = (min(image_size),)
    reference.transform.max_size = max(image_size)
    reference.roi_heads.detections_per_img = max_detections
    return reference.eval()


class EagerStages:
    """The stages of one detector for one image size; every method returns float32 arrays.

    Attributes:
        model: a copy that takes images of `image_size` as they are.
        image_size: (height, width) of the images.
        labels: all that the model can give.
        cuts: score threshold and number of detections where its list ends.
        by_probability: whether its keypoint scores are probabilities.
    """

    def __init__(self, model: GeneralizedRCNN, image_size: tuple[int, int], max_detections: int) -> None:
        """
        Args:
            model: a detector in eval mode on the CPU; not changed.
            image_size: (height, width) of the images.
            max_detections: how many to keep per image.
        """
        self.model = without_resize(model, image_size, max_detections)
        self.image_size = image_size
        self.labels = tuple(range(1, self.model.roi_heads.box_predictor.cls_score.out_features))
        every_label = Categories(self.labels, self.labels, tuple(map(str, self.labels)))
        self._predictor = TorchPredictor(self.model, task_of(model), every_label, device="cpu")
        heads = self.model.roi_heads
        self.cuts: dict[str, Any] = {
            "score_threshold": heads.score_thresh,
            "max_detections": heads.detections_per_img,
        }
        self.by_probability = heads.has_keypoint() and isinstance(heads.keypoint_predictor, NormalisedKeypointPredictor)

    def whole(self, images: npt.NDArray[np.uint8]) -> list[Detections]:
        """Images uint8 [B, H, W, 3] -> detections."""
        return self._predictor(list(images))

    @torch.no_grad()
    def references(self, images: npt.NDArray[np.uint8], limits: Tolerances) -> list[Reference]:
        """Images uint8 [B, H, W, 3] -> as `whole`, masks and keypoints for a sample of the detections only.

        `limits` say which pixels of a mask are undecided: where another box or probability that they allow would
        decide otherwise. A small box that moves across a whole pixel changes a tenth of its mask.
        The steps are those of torchvision's `RoIHeads.forward`; a test holds them to `whole`.
        """
        model, heads = self.model, self.model.roi_heads
        sizes = [self.image_size] * len(images)
        batch = model.transform(list(to_unit_range(torch.from_numpy(images).permute(0, 3, 1, 2))))[0]
        maps = model.backbone(batch.tensors)
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        proposals, _ = model.rpn(batch, maps)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, sizes)))
        found = heads.postprocess_detections(logits, deltas, proposals, sizes)
        results = [dict(zip(("boxes", "scores", "labels"), parts, strict=True)) for parts in zip(*found, strict=True)]
        samples = [thinned(len(result["boxes"])) for result in results]
        sampled = [
            {name: values[torch.from_numpy(sample)] for name, values in result.items()}
            for result, sample in zip(results, samples, strict=True)
        ]
        boxes = [part["boxes"] for part in sampled]
        masks: list[Any] = [None] * len(images)
        undecided: list[Any] = [None] * len(images)
        heatmaps: list[Any] = [None] * len(images)
        if heads.has_mask():
            local = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, sizes)))
            local = maskrcnn_inference(local, [part["labels"] for part in sampled])
            for index, (part, mask) in enumerate(zip(sampled, local, strict=True)):
                masks[index], undecided[index] = self._pasted(part["boxes"], mask, limits)
        if heads.has_keypoint():
            pooled = heads.keypoint_roi_pool(maps, boxes, sizes)
            every = heads.keypoint_predictor(heads.keypoint_head(pooled))
            heatmaps = [part.numpy() for part in every.split([len(part) for part in boxes])]
        return [
            Reference(_detections(result, self.image_size), sample, mask, unsure, maps_of, self.by_probability)
            for result, sample, mask, unsure, maps_of in zip(results, samples, masks, undecided, heatmaps, strict=True)
        ]

    def _pasted(self, boxes: Tensor, local: Tensor, limits: Tolerances) -> list[npt.NDArray[np.bool_]]:
        """Boxes [N, 4] and their masks [N, 1, M, M] -> masks [N, H, W] in the image, and which pixels are undecided."""
        pasted = []
        for move in MOVES:
            part = {"boxes": boxes + limits.box_px * torch.tensor(move), "masks": local}
            pasted.append(self.model.transform.postprocess([part], *[[self.image_size]] * 2)[0]["masks"][:, 0].numpy())
        inside = [part > MASK_THRESHOLD for part in pasted]
        close = [np.abs(part - MASK_THRESHOLD) <= limits.mask_probability for part in pasted]
        return [inside[0], np.any([*close, *(part != inside[0] for part in inside[1:])], axis=0)]

    def backbone(self, images: npt.NDArray[np.uint8]) -> Arrays:
        """Images uint8 [B, H, W, 3] -> "body.NAME" feature maps."""
        inputs = to_unit_range(torch.from_numpy(images).permute(0, 3, 1, 2))
        padded = self.model.transform(list(inputs))[0].tensors
        if isinstance(self.model.backbone, BackboneWithFPN):
            maps = self.model.backbone.body(padded)
        else:
            maps = self.model.backbone(padded)
            maps = {"0": maps} if isinstance(maps, Tensor) else maps
        return {f"body.{name}": value.numpy() for name, value in maps.items()}

    def fpn(self, stages: Arrays) -> Arrays:
        """The graph's body maps -> "fpn.NAME"."""
        body = feature_maps(stages, "body.")
        maps = self.model.backbone.fpn(body) if isinstance(self.model.backbone, BackboneWithFPN) else body
        return {f"fpn.{name}": value.numpy() for name, value in maps.items()}

    def rpn_head(self, stages: Arrays) -> Arrays:
        """The graph's pyramid -> "rpn_logits.LEVEL" and "rpn_deltas.LEVEL"."""
        logits, deltas = self.model.rpn.head(list(feature_maps(stages, "fpn.").values()))
        outputs = {f"rpn_logits.{level}": value.numpy() for level, value in enumerate(logits)}
        return outputs | {f"rpn_deltas.{level}": value.numpy() for level, value in enumerate(deltas)}

    def proposals(self, stages: Arrays) -> list[npt.NDArray[np.float32]]:
        """The graph's RPN logits and deltas -> proposals [P, 4] of each image."""
        rpn = self.model.rpn
        maps = list(feature_maps(stages, "fpn.").values())
        logits = list(feature_maps(stages, "rpn_logits.").values())
        deltas = list(feature_maps(stages, "rpn_deltas.").values())
        batch = len(maps[0])
        padded = [
            self.model.transform.size_divisible * -(-side // self.model.transform.size_divisible)
            for side in self.image_size
        ]
        images = ImageList(torch.empty(batch, 3, *padded), [self.image_size] * batch)
        anchors = rpn.anchor_generator(images, maps)
        counts = [level[0].numel() for level in logits]
        objectness, regression = concat_box_prediction_layers(logits, deltas)
        boxes = rpn.box_coder.decode(regression, anchors).reshape(batch, -1, 4)
        kept, _ = rpn.filter_proposals(boxes, objectness, images.image_sizes, counts)
        return [part.numpy() for part in kept]

    def box_head(self, stages: Arrays) -> Arrays:
        """The graph's pyramid and proposals -> "class_logits" and "box_deltas", one row per proposal."""
        proposals = torch.from_numpy(np.asarray(stages["proposals"], np.float32))
        heads = self.model.roi_heads
        sizes = [self.image_size] * len(proposals)
        pooled = heads.box_roi_pool(feature_maps(stages, "fpn."), list(proposals), sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return {"class_logits": logits.numpy(), "box_deltas": deltas.numpy()}

    def detections(self, stages: Arrays) -> list[Detections]:
        """The graph's proposals, logits and deltas -> boxes, scores and labels of each image."""
        valid = torch.from_numpy(np.asarray(stages["proposal_valid"], bool))
        proposals = torch.from_numpy(np.asarray(stages["proposals"], np.float32))
        chosen = valid.reshape(-1)
        boxes, scores, labels = self.model.roi_heads.postprocess_detections(
            torch.from_numpy(np.asarray(stages["class_logits"], np.float32))[chosen],
            torch.from_numpy(np.asarray(stages["box_deltas"], np.float32))[chosen],
            [part[keep] for part, keep in zip(proposals, valid, strict=True)],
            [self.image_size] * len(proposals),
        )
        found = zip(boxes, scores, labels, strict=True)
        return [_detections({"boxes": b, "scores": s, "labels": c}, self.image_size) for b, s, c in found]

    def masks(
        self, stages: Arrays, boxes: Sequence[npt.NDArray[np.float32]], labels: npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.float32]:
        """The graph's pyramid, some boxes [n, 4] of each image and all their labels -> probabilities [N, M, M]."""
        heads = self.model.roi_heads
        pooled = heads.mask_roi_pool(feature_maps(stages, "fpn."), *self._boxes(boxes))
        logits = heads.mask_predictor(heads.mask_head(pooled))
        of_label = maskrcnn_inference(logits, [torch.from_numpy(np.asarray(labels, np.int64))])[0]
        result: npt.NDArray[np.float32] = of_label[:, 0].numpy()
        return result

    def heatmaps(self, stages: Arrays, boxes: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """The graph's pyramid and some boxes [n, 4] of each image -> keypoint heatmaps [N, K, S, S]."""
        heads = self.model.roi_heads
        pooled = heads.keypoint_roi_pool(feature_maps(stages, "fpn."), *self._boxes(boxes))
        result: npt.NDArray[np.float32] = heads.keypoint_predictor(heads.keypoint_head(pooled)).numpy()
        return result

    def _boxes(self, boxes: Sequence[npt.NDArray[np.float32]]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        return [_tensor(part) for part in boxes], [self.image_size] * len(boxes)


def doubled(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The graph's keypoint maps [N, K, S, S] -> heatmaps [N, K, 2 S, 2 S], as torchvision's predictor makes them."""
    heatmaps = torch.nn.functional.interpolate(_tensor(maps), scale_factor=2.0, mode="bilinear", align_corners=False)
    result: npt.NDArray[np.float32] = heatmaps.numpy()
    return result


def feature_maps(stages: Arrays, prefix: str) -> "OrderedDict[str, Tensor]":
    """The tensors whose name starts with `prefix`, by the rest of the name, float32, in order."""
    return OrderedDict(
        (name.removeprefix(prefix), _tensor(value)) for name, value in stages.items() if name.startswith(prefix)
    )


def _detections(found: dict[str, Tensor], image_size: tuple[int, int]) -> Detections:
    return Detections(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy(), image_size)


def _tensor(values: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))

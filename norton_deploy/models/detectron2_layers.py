"""The layers that Detectron2 computes otherwise than torchvision, as subclasses of torchvision's.

Images resized as Pillow does and masks pasted at subpixel positions (`DetectorTransform`); anchors and RoIAlign on a
pyramid of fixed strides (`PyramidAnchorGenerator`, `PyramidRoIAlign`); keypoint scores that are probabilities
(`NormalisedKeypointPredictor`). `Detectron2Settings` chooses among them.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes, resize_keypoints
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper, _convert_to_roi_format, _filter_input

from norton_deploy.errors import UserError
from norton_deploy.masks import MaskPaste

ImageResize = Literal["torchvision", "antialiased"]
KeypointScore = Literal["logit", "probability"]
PILLOW_BITS = 22
"""Fractional bits of Pillow's filter weights for 8-bit images."""


class DetectorTransform(GeneralizedRCNNTransform):
    """`GeneralizedRCNNTransform` with Pillow's resizing, masks at subpixel positions and keypoint probabilities."""

    def __init__(
        self, *as_torchvision: Any, image_resize: ImageResize, mask_paste: MaskPaste, keypoint_score: KeypointScore
    ) -> None:
        """See `Detectron2Settings`; the heads give log probabilities where `keypoint_score` is "probability"."""
        super().__init__(*as_torchvision)
        self.image_resize, self.mask_paste, self.keypoint_score = image_resize, mask_paste, keypoint_score

    def normalize(self, image: Tensor) -> Tensor:
        """Mean and std; with "antialiased" that waits until the image is resized."""
        return image if self.image_resize == "antialiased" else super().normalize(image)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image [3, H, W] and its target to the settings' size.

        Raises:
            UserError: nothing would be left of the image's short side.
        """
        old = (image.shape[-2], image.shape[-1])
        if self.max_size * min(old) <= max(old):
            raise UserError(
                f"an image of {old[0]}x{old[1]} pixels is too thin: with its long side at {self.max_size} pixels "
                "nothing is left of the short one; crop it"
            )
        if self.image_resize == "torchvision":
            return super().resize(image, target)
        short_side = self.torch_choice(list(self.min_size)) if self.training else self.min_size[-1]
        new = shortest_edge_size(old, short_side, self.max_size)
        image = super().normalize(resize_like_pillow(image, new))
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], list(old), list(new))
            if "keypoints" in target:
                target["keypoints"] = resize_keypoints(target["keypoints"], list(old), list(new))
            if "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None].float(), new)[:, 0].byte()
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Detections in pixels of the original images, masks pasted to [N, 1, H, W] probabilities."""
        if self.training:
            return result
        local_masks = [
            found.pop("masks") if self.mask_paste == "subpixel" and "masks" in found else None for found in result
        ]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, masks, size in zip(result, local_masks, original_image_sizes, strict=True):
            if masks is not None:
                found["masks"] = paste_subpixel(masks[:, 0], found["boxes"], size)[:, None]
            if self.keypoint_score == "probability" and "keypoints_scores" in found:
                found["keypoints_scores"] = found["keypoints_scores"].exp()
        return result


def shortest_edge_size(image_size: tuple[int, int], short_side: int, max_size: int) -> tuple[int, int]:
    """The (height, width), rounded to the nearest, with the given short side unless the long one exceeds `max_size`."""
    shorter, longer = min(image_size), max(image_size)
    # In this order of operations, so that halves round as in Detectron2.
    scale = short_side / shorter
    sides = [float(short_side) if side == shorter else scale * side for side in image_size]
    if scale * longer > max_size:
        limit = max_size / max(sides)
        sides = [side * limit for side in sides]
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def resize_like_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's bilinear resizing of an 8-bit image, to the bit: antialiased, first along rows, then along columns.

    Args:
        image: [3, H, W], 0..1; rounded to steps of 1/255.
        size: (height, width) of the result.

    Returns:
        [3, *size], 0..1 in steps of 1/255.
    """
    levels = (image * 255).round().to(torch.int32)
    for axis in (2, 1):
        if levels.shape[axis] == size[axis - 1]:
            continue
        taps, weights = pillow_taps(levels.shape[axis], size[axis - 1])
        shape = (-1, 1) if axis == 1 else (-1,)
        # Whole numbers below 2^31 throughout, so that nothing is rounded but here, half up.
        total = sum(
            levels.index_select(axis, tap) * weight.reshape(shape)
            for tap, weight in zip(taps.to(image.device), weights.to(image.device), strict=True)
        )
        levels = ((total + (1 << (PILLOW_BITS - 1))) >> PILLOW_BITS).clamp(0, 255)
    return levels.to(image.dtype) / 255


def pillow_taps(source: int, target: int) -> tuple[Tensor, Tensor]:
    """What each of `target` pixels takes from an axis of `source` pixels in Pillow's bilinear filter.

    Returns:
        taps int64 [T, target], weights int32 [T, target] in units of 2^-22; unused taps weigh 0.
    """
    scale = source / target
    support = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).trunc().clamp(min=0)
    end = (centre + support + 0.5).trunc().clamp(max=source)
    taps = first[None] + torch.arange(2 * math.ceil(support) + 1, dtype=torch.float64)[:, None]
    hat = (1 - ((taps - centre + 0.5) * (1 / support)).abs()).clamp(min=0) * (taps < end)
    weights = (hat / hat.sum(dim=0) * (1 << PILLOW_BITS) + 0.5).trunc()
    return taps.clamp(max=source - 1).to(torch.int64), weights.to(torch.int32)


def paste_subpixel(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Sample box-local masks at the centres of the image's pixels; outside the mask they are zero.

    Args:
        masks: [N, M, M], probabilities within the box.
        boxes: [N, 4] xyxy in pixels of the image.
        image_size: (height, width) of the image.

    Returns:
        [N, H, W] probabilities.
    """
    x1, y1, x2, y2 = boxes.unbind(1)
    vertical = _hat_weights(y1, y2, image_size[0], masks.shape[1])
    horizontal = _hat_weights(x1, x2, image_size[1], masks.shape[2])
    return vertical @ masks @ horizontal.transpose(1, 2)


def _hat_weights(low: Tensor, high: Tensor, pixels: int, side: int) -> Tensor:
    """Bilinear weights [N, pixels, side] of `side` mask cells that span low..high [N]."""
    centre = torch.arange(pixels, dtype=low.dtype, device=low.device) + 0.5
    extent = (high - low).clamp(min=torch.finfo(low.dtype).eps)
    position = (centre[None, :] - low[:, None]) / extent[:, None] * side - 0.5
    cells = torch.arange(side, dtype=low.dtype, device=low.device)
    return (1 - (position[:, :, None] - cells).abs()).clamp(min=0)


class PyramidAnchorGenerator(AnchorGenerator):
    """torchvision's `AnchorGenerator`, but the strides are given instead of derived from the image's size.

    The two differ where a feature map's size was rounded up: the last level of an 800 x 800 image has 13 cells,
    so that torchvision places its anchors 800 // 13 = 61 pixels apart, and not 64.
    """

    def __init__(
        self,
        sizes: tuple[tuple[int, ...], ...],
        aspect_ratios: tuple[tuple[float, ...], ...],
        strides: tuple[int, ...],
        *,
        rounding: bool = True,
        offset: float = 0.0,
    ) -> None:
        """
        Args:
            sizes: anchor sides in pixels, per level.
            aspect_ratios: height over width, per level.
            strides: pixels between neighbouring cells, per level.
            rounding: whether anchors have whole pixels, as torchvision's.
            offset: centre of the first anchor, in strides from the image's corner.
        """
        self.strides, self.rounding, self.offset = strides, rounding, offset
        super().__init__(sizes, aspect_ratios)

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (torchvision's signature)
    ) -> Tensor:
        """Anchors centred on the origin, [ratios * sizes, 4] xyxy, ratio by ratio."""
        if self.rounding:
            return super().generate_anchors(scales, aspect_ratios, dtype, device)
        side = torch.tensor(scales, dtype=torch.float64)
        height = torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()
        widths = (side[None, :] / height[:, None]).flatten()
        heights = (side[None, :] * height[:, None]).flatten()
        return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).to(dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of all levels, [A, 4] xyxy in pixels, once for each image of the batch."""
        dtype, device = feature_maps[0].dtype, feature_maps[0].device
        self.set_cell_anchors(dtype, device)
        levels = []
        for feature_map, stride, cell in zip(feature_maps, self.strides, self.cell_anchors, strict=True):
            height, width = feature_map.shape[-2:]
            y = (torch.arange(height, dtype=dtype, device=device) + self.offset) * stride
            x = (torch.arange(width, dtype=dtype, device=device) + self.offset) * stride
            centre_y, centre_x = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack([centre_x, centre_y, centre_x, centre_y], dim=-1)
            levels.append((centres[:, :, None, :] + cell).reshape(-1, 4))
        anchors = torch.cat(levels)
        return [anchors] * len(image_list.image_sizes)


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's `MultiScaleRoIAlign`, but strides are given and the sampling may be aligned.

    torchvision infers the scales from the first batch's image sizes and samples without alignment: half a cell
    to the right and below. Levels are chosen by eq. 1 of the FPN paper without torchvision's 1e-6.
    """

    scales: list[float]
    map_levels: LevelMapper

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int,
        sampling_ratio: int,
        strides: tuple[int, ...],
        *,
        aligned: bool,
        canonical_scale: int = 224,
    ) -> None:
        """
        Args:
            featmap_names: names of the pyramid levels, finest first.
            sampling_ratio: samples per cell and axis; 0: as many as the cell has pixels, rounded up.
            strides: pixels per cell of each level; every level has twice that of the one before.
            canonical_scale: side in pixels of a RoI that is pooled from stride 16.
        """
        super().__init__(featmap_names, output_size, sampling_ratio, canonical_scale=canonical_scale)
        self.aligned = aligned
        self.scales = [1.0 / stride for stride in strides]
        finest, coarsest = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
        self.map_levels = LevelMapper(finest, coarsest, canonical_scale, self.canonical_level, eps=0.0)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """
        Args:
            x: name -> features [B, C, H, W].
            boxes: per image [R, 4] xyxy in pixels.

        Returns:
            [sum of R, C, output_size, output_size].
        """
        maps = _filter_input(x, self.featmap_names)
        rois = _convert_to_roi_format(boxes)
        levels = self.map_levels(boxes)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            chosen = torch.where(levels == level)[0]
            cells = roi_align(
                features, rois[chosen], self.output_size, scale, self.sampling_ratio, aligned=self.aligned
            )
            # under autocast the levels' types may differ
            pooled[chosen] = cells.to(pooled.dtype)
        return pooled


class NormalisedKeypointPredictor(KeypointRCNNPredictor):
    """torchvision's predictor with heatmaps that are normalised to log probabilities over their cells.

    The value at a decoded keypoint is then its log probability: decoding is linear with weights that sum to 1, so
    a constant passes through it. The training loss, a cross entropy over the cells, is the same either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, P, P] -> log probabilities [N, K, S, S]."""
        heatmaps: Tensor = super().forward(x)
        return heatmaps - heatmaps.flatten(2).logsumexp(dim=2)[:, :, None, None]

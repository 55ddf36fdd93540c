"""What a detector does to images before, and to detections after the network, where it is not torchvision's way."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import (
    GeneralizedRCNNTransform,
    resize_boxes,
    resize_keypoints,
)

from norton_deploy.structures import MaskPaste

ImageResize = Literal["torchvision", "antialiased"]
KeypointScore = Literal["logit", "probability"]
PILLOW_BITS = 22
"""Fractional bits of Pillow's filter weights for 8-bit images."""


class DetectorTransform(GeneralizedRCNNTransform):
    """`GeneralizedRCNNTransform` with Pillow's resizing, masks at subpixel positions and keypoint probabilities."""

    def __init__(
        self,
        min_size: int | tuple[int, ...],
        max_size: int,
        image_mean: list[float],
        image_std: list[float],
        *,
        image_resize: ImageResize,
        mask_paste: MaskPaste,
        keypoint_score: KeypointScore,
    ) -> None:
        """
        Args:
            min_size, max_size, image_mean, image_std: as torchvision's.
            image_resize: see `DetectorSettings`; likewise the next two.
            mask_paste: how box-local masks come into the image.
            keypoint_score: "probability": the heads give log probabilities, which become probabilities here.
        """
        super().__init__(min_size, max_size, image_mean, image_std)
        self.image_resize = image_resize
        self.mask_paste = mask_paste
        self.keypoint_score = keypoint_score

    def normalize(self, image: Tensor) -> Tensor:
        """Mean and std; with "antialiased" that waits until the image is resized."""
        return image if self.image_resize == "antialiased" else super().normalize(image)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image [3, H, W] and its target to the settings' size."""
        if self.image_resize == "torchvision":
            return super().resize(image, target)
        old = (image.shape[-2], image.shape[-1])
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

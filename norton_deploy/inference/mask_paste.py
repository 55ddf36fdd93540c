"""Pasting box-local mask probabilities into the image, with torchvision's or Detectron2's semantic; NumPy only.

`torchvision.models.detection.roi_heads.paste_masks_in_image` pads each mask by one zero on all sides, expands
its box by the same ratio, truncates the box to whole pixels and resizes the mask to it bilinearly. A bilinear
resize is a product with hat weights along each axis, so a mask costs two small matrix products, and only the
pixels of its own box are ever touched. Detectron2 truncates nothing ("subpixel"): it samples the mask at the
centres of the image's pixels, with zeros around the mask.
"""

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError
from norton_deploy.structures import MaskPaste

PADDING = 1


def paste_masks(
    probabilities: npt.NDArray[np.float32],
    boxes: npt.NDArray[np.float32],
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
    mask_paste: MaskPaste = "whole_pixels",
) -> npt.NDArray[np.bool_]:
    """Resize each box-local mask to its box and cut it at `threshold`.

    Args:
        probabilities: [N, M, M], 0..1, the mask within its box.
        boxes: [N, 4], xyxy in pixels of the image.
        image_size: (height, width) of the image in pixels.
        threshold: a pixel belongs to the object when its probability is larger.
        mask_paste: which semantic; the model's own (`DetectorSettings.mask_paste`).

    Returns:
        bool [N, H, W].

    Raises:
        UserError: the shapes do not belong together.
    """
    masks = np.asarray(probabilities, dtype=np.float32)
    count = len(masks)
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2] or np.shape(boxes) != (count, 4):
        raise UserError(
            f"paste_masks: expected probabilities [N, M, M] and boxes [N, 4], got {masks.shape} and {np.shape(boxes)}"
        )
    if mask_paste == "subpixel":
        return paste_subpixel(masks, np.asarray(boxes, dtype=np.float32), image_size, threshold)
    height, width = image_size
    side = masks.shape[1] + 2 * PADDING
    padded = np.pad(masks, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    expanded = expand_boxes(np.asarray(boxes, dtype=np.float32), side / masks.shape[1])
    pasted = np.zeros((count, height, width), dtype=bool)
    for mask, box, target in zip(padded, expanded.tolist(), pasted, strict=True):
        x1, y1, x2, y2 = box
        columns, rows = slice(max(x1, 0), min(x2 + 1, width)), slice(max(y1, 0), min(y2 + 1, height))
        if columns.start >= columns.stop or rows.start >= rows.stop:
            continue
        vertical = hat_weights(side, y2 - y1 + 1)[rows.start - y1 : rows.stop - y1]
        horizontal = hat_weights(side, x2 - x1 + 1)[columns.start - x1 : columns.stop - x1]
        target[rows, columns] = vertical @ mask @ horizontal.T > threshold
    return pasted


def paste_subpixel(
    masks: npt.NDArray[np.float32], boxes: npt.NDArray[np.float32], image_size: tuple[int, int], threshold: float
) -> npt.NDArray[np.bool_]:
    """`paste_masks` at subpixel positions: as `norton_deploy.models.detectron2_layers.paste_subpixel`, box by box."""
    pasted = np.zeros((len(masks), *image_size), dtype=bool)
    for mask, (x1, y1, x2, y2), target in zip(masks, boxes, pasted, strict=True):
        rows, vertical = _centre_weights(y1, y2, image_size[0], len(mask))
        columns, horizontal = _centre_weights(x1, x2, image_size[1], len(mask))
        target[rows, columns] = vertical @ mask @ horizontal.T > threshold
    return pasted


def _centre_weights(low: np.float32, high: np.float32, pixels: int, side: int) -> tuple[slice, npt.NDArray[np.float32]]:
    """The pixels whose centres a mask of `side` cells over low..high reaches, and its bilinear weights there."""
    extent = max(high - low, np.finfo(np.float32).eps)
    reach = extent / side
    span = slice(max(int(np.floor(low - reach)), 0), max(min(int(np.ceil(high + reach)), pixels), 0))
    centres = np.arange(span.start, max(span.start, span.stop), dtype=np.float32) + np.float32(0.5)
    positions = (centres - low) / extent * np.float32(side) - np.float32(0.5)
    distance = np.abs(positions[:, None] - np.arange(side, dtype=np.float32)[None, :])
    return slice(span.start, span.start + len(centres)), np.maximum(np.float32(1) - distance, np.float32(0))


def expand_boxes(boxes: npt.NDArray[np.float32], scale: float) -> npt.NDArray[np.int64]:
    """Scale boxes [N, 4] about their centres and truncate them to whole pixels (towards zero)."""
    centre = (boxes[:, 2:] + boxes[:, :2]) * np.float32(0.5)
    half = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5) * np.float32(scale)
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.int64)


def hat_weights(source: int, target: int) -> npt.NDArray[np.float32]:
    """Bilinear resizing along one axis as a matrix [target, source] (pixel centres at half integers)."""
    step = np.float32(source / target)
    positions = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    positions = positions.clip(0, source - 1)
    distance = np.abs(positions[:, None] - np.arange(source, dtype=np.float32)[None, :])
    weights: npt.NDArray[np.float32] = np.maximum(np.float32(1) - distance, np.float32(0))
    return weights

"""Pasting box-local mask probabilities into the image, with torchvision's semantic; NumPy only.

`torchvision.models.detection.roi_heads.paste_masks_in_image` pads each mask by one zero on all sides, expands
its box by the same ratio, truncates the box to whole pixels and resizes the mask to it bilinearly. A bilinear
resize is a product with hat weights along each axis, so a mask costs two small matrix products, and only the
pixels of its own box are ever touched.
"""

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError

PADDING = 1


def paste_masks(
    probabilities: npt.NDArray[np.float32],
    boxes: npt.NDArray[np.float32],
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
) -> npt.NDArray[np.bool_]:
    """Resize each box-local mask to its box and cut it at `threshold`.

    Args:
        probabilities: [N, M, M], 0..1, the mask within its box.
        boxes: [N, 4], xyxy in pixels of the image.
        image_size: (height, width) of the image in pixels.
        threshold: a pixel belongs to the object when its probability is larger.

    Returns:
        bool [N, H, W].

    Raises:
        UserError: the shapes do not belong together.
    """
    masks = np.asarray(probabilities, dtype=np.float32)
    count = len(masks)
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2] or np.shape(boxes) != (count, 4):
        raise UserError(
            "paste_masks: expected probabilities [N, M, M] and boxes [N, 4], "
            f"got {masks.shape} and {np.shape(boxes)}"
        )
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

"""Masks as detectors give them, box by box, and how they come into the image. NumPy and OpenCV only.

`torchvision.models.detection.roi_heads.paste_masks_in_image` pads each mask by one zero on all sides, expands
its box by the same ratio, truncates the box to whole pixels and resizes the mask to it bilinearly, as OpenCV does.
Detectron2 truncates nothing ("subpixel"): it samples the mask at the centres of the image's pixels, with zeros around
the mask; a product with hat weights along each axis. Only the pixels of its own box are ever touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError

MaskPaste = Literal["whole_pixels", "subpixel"]
Region = tuple[slice, slice]
"""Rows and columns of an image."""
THRESHOLD = 0.5
"""A pixel belongs to the object when its probability is larger."""
PADDING = 1
"""Zeros around a mask where it is pasted at whole pixels."""


@dataclass(frozen=True)
class MasksInBoxes:
    """Masks that are not in the image yet: a hundred whole masks of a frame are 90 MB, these are 0.3.

    Attributes:
        probabilities: float32 [N, M, M], 0..1, each over its box.
        boxes: float32 [N, 4], xyxy in pixels of the image, not clipped to it.
        image_size: (height, width) of the image in pixels.
        mask_paste: which semantic; the model's own (`DetectorSettings.mask_paste`).
    """

    probabilities: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    image_size: tuple[int, int]
    mask_paste: MaskPaste = "whole_pixels"

    def __post_init__(self) -> None:
        masks, boxes = np.shape(self.probabilities), np.shape(self.boxes)
        if len(masks) != 3 or masks[1] != masks[2] or boxes != (masks[0], 4):
            raise UserError(f"masks: expected probabilities [N, M, M] and boxes [N, 4], got {masks} and {boxes}")

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the pasted masks."""
        return (len(self), *self.image_size)

    def __getitem__(self, index: Any) -> MasksInBoxes:
        """The masks that a NumPy index (mask, slice or integer array) selects."""
        return MasksInBoxes(self.probabilities[index], self.boxes[index], self.image_size, self.mask_paste)

    def crop(self, index: int) -> tuple[Region, npt.NDArray[np.bool_]]:
        """The part of the image that a mask reaches, and its pixels there, bool [rows, columns]."""
        mask, box = self.probabilities[index], self.boxes[index]
        (height, width), side = self.image_size, mask.shape[0]
        if self.mask_paste == "subpixel":
            rows, vertical = _centre_weights(box[1], box[3], height, side)
            columns, horizontal = _centre_weights(box[0], box[2], width, side)
            return (rows, columns), vertical @ mask @ horizontal.T > THRESHOLD
        padded = np.zeros((side + 2 * PADDING,) * 2, np.float32)
        padded[PADDING:-PADDING, PADDING:-PADDING] = mask
        x1, y1, x2, y2 = expand_box(box, len(padded) / side).tolist()
        rows, columns = _inside(y1, y2, height), _inside(x1, x2, width)
        if rows.start == rows.stop or columns.start == columns.stop:
            return (rows, columns), np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
        whole = cv2.resize(padded, (x2 - x1 + 1, y2 - y1 + 1), interpolation=cv2.INTER_LINEAR)
        part = whole[rows.start - y1 : rows.stop - y1, columns.start - x1 : columns.stop - x1]
        return (rows, columns), np.asarray(part > THRESHOLD)

    def paste(self) -> npt.NDArray[np.bool_]:
        """All masks in the image, bool [N, H, W]."""
        pasted = np.zeros(self.shape, dtype=bool)
        for index, target in enumerate(pasted):
            region, target_pixels = self.crop(index)
            target[region] = target_pixels
        return pasted


def _inside(low: int, high: int, pixels: int) -> slice:
    """Those of the pixels low..high that the image has; an empty slice within it where it has none."""
    start = min(max(low, 0), pixels)
    return slice(start, max(start, min(high + 1, pixels)))


def _centre_weights(low: np.float32, high: np.float32, pixels: int, side: int) -> tuple[slice, npt.NDArray[np.float32]]:
    """The pixels whose centres a mask of `side` cells over low..high reaches, and its bilinear weights there."""
    extent = max(high - low, np.finfo(np.float32).eps)
    reach = extent / side
    span = slice(max(int(np.floor(low - reach)), 0), max(min(int(np.ceil(high + reach)), pixels), 0))
    centres = np.arange(span.start, max(span.start, span.stop), dtype=np.float32) + np.float32(0.5)
    positions = (centres - low) / extent * np.float32(side) - np.float32(0.5)
    distance = np.abs(positions[:, None] - np.arange(side, dtype=np.float32)[None, :])
    return slice(span.start, span.start + len(centres)), np.maximum(np.float32(1) - distance, np.float32(0))


def expand_box(box: npt.NDArray[np.float32], scale: float) -> npt.NDArray[np.int64]:
    """Scale a box [4] about its centre and truncate it to whole pixels (towards zero)."""
    centre = (box[2:] + box[:2]) * np.float32(0.5)
    half = (box[2:] - box[:2]) * np.float32(0.5) * np.float32(scale)
    return np.concatenate([centre - half, centre + half]).astype(np.int64)

"""How good a decoded keypoint is: what its heatmap loses at the chosen pixel, not how far that is from the maximum.

A keypoint is the argmax of a heatmap that is resized to its box. Where two pixels differ by less than rounding each is
as right as the other, however far apart they lie: a trained head has one clear peak, a random or much compressed one
may give heatmaps that are flat or periodic.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Values = npt.NDArray[np.float32]
FLAT = 1e-2
"""A heatmap's range counts as at least this share of its largest absolute value; below, rounding is all there is."""
WHOLE = 1e-3
"""Pixels within which a box's side may have been rounded up to either of two whole numbers ..."""
EXACT_PX = 0.02
"""... and the one that fits all keypoints so well is the one that was used."""


@dataclass(frozen=True)
class KeypointLoss:
    """Of N objects with K keypoints, each [N, K].

    Attributes:
        loss: maximum of the resized heatmap less its value at the pixel nearest to the keypoint, relative to its range.
        off_grid_px: distance to the centre of that pixel.
        distance_px: distance to the maximum.
        value: of the heatmap at that pixel.
        spread: the range that `loss` is relative to.
    """

    loss: Values
    off_grid_px: Values
    distance_px: Values
    value: Values
    spread: Values


def keypoint_loss(heatmaps: Values, boxes: Values, points: Values) -> KeypointLoss:
    """Judge keypoints by their heatmaps, resized as torchvision's `heatmaps_to_keypoints` does (bicubic).

    Args:
        heatmaps: [N, K, S, S].
        boxes: [N, 4] xyxy in pixels; those that the keypoints were decoded for.
        points: [N, K, 2], decoded (x, y) in pixels.
    """
    shape = points.shape[:2]
    found = {name: np.zeros(shape, np.float32) for name in KeypointLoss.__dataclass_fields__}
    for index, (maps, box) in enumerate(zip(heatmaps, boxes, strict=True)):
        x, columns, x_off = _pixels(points[index, :, 0], box[0], box[2])
        y, rows, y_off = _pixels(points[index, :, 1], box[1], box[3])
        size = maps.shape[-1]
        resized = _resize_matrix(size, rows) @ maps @ _resize_matrix(size, columns).T
        flat = resized.reshape(len(maps), -1)
        best = flat.argmax(axis=1)
        value = resized[np.arange(len(maps)), y, x]
        spread = np.maximum(np.ptp(maps, axis=(1, 2)), FLAT * np.abs(maps).max(axis=(1, 2)))
        spread = np.maximum(spread, np.finfo(np.float32).tiny)
        step = [max(box[2] - box[0], 1) / columns, max(box[3] - box[1], 1) / rows]
        found["loss"][index] = (flat.max(axis=1) - value) / spread
        found["off_grid_px"][index] = np.hypot(x_off, y_off)
        found["distance_px"][index] = np.hypot((best % columns - x) * step[0], (best // columns - y) * step[1])
        found["value"][index] = value
        found["spread"][index] = spread
    return KeypointLoss(**found)


def _pixels(at: Values, low: np.float32, high: np.float32) -> tuple[npt.NDArray[np.int64], int, Values]:
    """Pixel of each coordinate on an axis of a box, how many pixels the axis has, and distances to their centres."""
    length = max(float(high - low), 1.0)
    fits = []
    for count in dict.fromkeys(int(np.ceil(length + rounding)) for rounding in (0, -WHOLE, WHOLE)):
        position = (at - low) * (count / length) - 0.5
        pixel = np.rint(position).clip(0, count - 1).astype(np.int64)
        off = np.abs(position - pixel).astype(np.float32) * np.float32(length / count)
        fits.append((pixel, count, off))
    return next((fit for fit in fits if fit[2].max() < EXACT_PX), fits[0])


@lru_cache(maxsize=256)
def _resize_matrix(size: int, target: int) -> Values:
    """torch's bicubic resize of `size` values to `target` pixels along one axis, as a matrix [target, size]."""
    unit = torch.eye(size)[None, None]
    matrix: Values = F.interpolate(unit, (target, size), mode="bicubic", align_corners=False)[0, 0].numpy()
    return matrix

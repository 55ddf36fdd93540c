"""Comparing decoded keypoints where a heatmap has several equal maxima.

A keypoint is the argmax of a resized heatmap. Where two pixels differ by less than rounding each is as right as the
other, and their distance says nothing. A trained head has one clear peak; a random or much compressed one may give
heatmaps that are flat or periodic.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

ROUNDING = 1e-5
"""Pixels within this share of a heatmap's largest absolute value below its maximum tie with it."""
AMBIGUITY = 2e-3
"""Maxima within this share of a heatmap's range may change places when the heatmap itself changes a little."""


def keypoint_distances(
    heatmaps: npt.NDArray[np.float32],
    boxes: npt.NDArray[np.float32],
    points: npt.NDArray[np.float32],
    limit_px: float,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """How far decoded keypoints are from the pixels that could be their heatmap's maximum.

    Args:
        heatmaps: [N, K, S, S].
        boxes: [N, 4] xyxy in pixels.
        points: [N, K, 2], decoded (x, y) in pixels.
        limit_px: maxima farther apart than three times this make a keypoint ambiguous.

    Returns:
        distance [N, K] in pixels to the nearest pixel that ties with the maximum of the heatmap, resized as
        torchvision does; and whether the keypoint is ambiguous, [N, K]: a heatmap that differs by little more than
        rounding may have its maximum elsewhere.
    """
    distances = np.zeros(points.shape[:2], np.float32)
    ambiguous = np.zeros(points.shape[:2], bool)
    for index, (maps, (x1, y1, x2, y2)) in enumerate(zip(heatmaps, boxes, strict=True)):
        width, height = max(x2 - x1, np.float32(1)), max(y2 - y1, np.float32(1))
        rows, columns = int(np.ceil(height)), int(np.ceil(width))
        resized = F.interpolate(torch.from_numpy(maps)[None], (rows, columns), mode="bicubic", align_corners=False)[0]
        for keypoint, (values, source) in enumerate(zip(resized.numpy(), maps, strict=True)):
            tie = ROUNDING * float(np.abs(source).max())
            near = max(AMBIGUITY * float(source.max() - source.min()), tie)
            y, x = np.nonzero(values >= values.max() - near)
            at = np.stack([(x + 0.5) * (width / columns) + x1, (y + 0.5) * (height / rows) + y1], axis=1)
            ambiguous[index, keypoint] = np.linalg.norm(np.ptp(at, axis=0)) > 3 * limit_px
            at = at[values[y, x] >= values.max() - tie]
            distances[index, keypoint] = np.linalg.norm(at - points[index, keypoint], axis=1).min()
    return distances, ambiguous

"""Comparing decoded keypoints where a heatmap has several equal maxima.

A keypoint is the argmax of a resized heatmap. Where two pixels differ by less than rounding, or than the graph's
search resolves, each is as right as the other, and their distance says nothing. A trained head has one clear peak;
a random or much compressed one may give heatmaps that are flat or periodic.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

TIE = 2e-3
"""Pixels within this share of a heatmap's range below its maximum tie with it ..."""
TIE_ROUNDING = 1e-5
"""... or within this share of its largest absolute value, where it is flat."""


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
        torchvision does; and whether the keypoint is ambiguous, [N, K].
    """
    distances = np.zeros(points.shape[:2], np.float32)
    ambiguous = np.zeros(points.shape[:2], bool)
    for index, (maps, (x1, y1, x2, y2)) in enumerate(zip(heatmaps, boxes, strict=True)):
        width, height = max(x2 - x1, np.float32(1)), max(y2 - y1, np.float32(1))
        rows, columns = int(np.ceil(height)), int(np.ceil(width))
        resized = F.interpolate(torch.from_numpy(maps)[None], (rows, columns), mode="bicubic", align_corners=False)[0]
        for keypoint, (values, source) in enumerate(zip(resized.numpy(), maps, strict=True)):
            tie = max(TIE * float(source.max() - source.min()), TIE_ROUNDING * float(np.abs(source).max()))
            y, x = np.nonzero(values >= values.max() - tie)
            at = np.stack([(x + 0.5) * (width / columns) + x1, (y + 0.5) * (height / rows) + y1], axis=1)
            distances[index, keypoint] = np.linalg.norm(at - points[index, keypoint], axis=1).min()
            ambiguous[index, keypoint] = np.linalg.norm(np.ptp(at, axis=0)) > 3 * limit_px
    return distances, ambiguous

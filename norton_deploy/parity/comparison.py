"""How far two runs of one model are apart: tensors, sets of boxes, paired detections."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.structures import Detections

Arrays = dict[str, npt.NDArray[Any]]
PAIRED_IOU = 0.5
"""Pairs overlap at least this much."""


@dataclass(frozen=True)
class Pairing:
    """Detections of two runs on one image, paired one to one by label and box.

    Attributes:
        pairs: [P, 2], index in the first and in the second run.
        unmatched: detections of either run without a partner.
        borderline: those of them that lie at a cut, where rounding decides: their score is within the score
            tolerance of the score threshold or of the last place of a full list.
        box_px: [P], largest corner distance in pixels.
        box_iou: [P].
        score: [P], difference of scores.
        mask_iou: [P], None without masks; two empty masks count as 1.
        keypoint_px: [P, K], distance in pixels; None without keypoints.
    """

    pairs: npt.NDArray[np.int64]
    unmatched: int
    borderline: int
    box_px: npt.NDArray[np.float32]
    box_iou: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    mask_iou: npt.NDArray[np.float32] | None
    keypoint_px: npt.NDArray[np.float32] | None


def pair_detections(
    first: Detections,
    second: Detections,
    *,
    score_threshold: float,
    max_detections: int,
    score_tolerance: float,
) -> Pairing:
    """Pair greedily, closest boxes first, within each label.

    Args:
        first, second: two runs on the same image.
        score_threshold: below it both runs drop detections.
        max_detections: both runs keep at most so many.
        score_tolerance: how far from a cut counts as borderline.
    """
    distance = np.abs(first.boxes[:, None] - second.boxes[None]).max(axis=2)
    overlap = box_iou(first.boxes, second.boxes)
    allowed = (first.labels[:, None] == second.labels[None]) & (overlap >= PAIRED_IOU)
    distance = np.where(allowed, distance, np.inf)
    pairs: list[tuple[int, int]] = []
    free_rows, free_columns = np.ones(len(first), bool), np.ones(len(second), bool)
    for flat in np.argsort(distance, axis=None, kind="stable"):
        row, column = divmod(int(flat), max(len(second), 1))
        if not np.isfinite(distance[row, column]):
            break
        if free_rows[row] and free_columns[column]:
            pairs.append((row, column))
            free_rows[row] = free_columns[column] = False
    index = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    a, b = first[index[:, 0]], second[index[:, 1]]
    lonely = np.concatenate([first.scores[free_rows], second.scores[free_columns]])
    cuts = [score_threshold]
    cuts += [float(run.scores.min()) for run in (first, second) if len(run) >= max_detections]
    at_cut = (np.abs(lonely[:, None] - np.array(cuts)) <= score_tolerance).any(axis=1)
    return Pairing(
        pairs=index,
        unmatched=len(lonely),
        borderline=int(at_cut.sum()),
        box_px=np.abs(a.boxes - b.boxes).max(axis=1, initial=0.0),
        box_iou=overlap[index[:, 0], index[:, 1]],
        score=np.abs(a.scores - b.scores),
        mask_iou=None if a.masks is None or b.masks is None else mask_iou(a.masks, b.masks),
        keypoint_px=None
        if a.keypoints is None or b.keypoints is None
        else np.linalg.norm(a.keypoints[..., :2] - b.keypoints[..., :2], axis=-1),
    )


def box_iou(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """IoU of all pairs of boxes [N, 4] and [M, 4]; [N, M]."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = np.prod((high - low).clip(0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - intersection
    iou: npt.NDArray[np.float32] = intersection / np.maximum(union, np.finfo(np.float32).tiny)
    return iou


def mask_iou(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """IoU of masks [N, H, W] one by one; two empty masks count as 1."""
    intersection = (first & second).sum(axis=(1, 2))
    union = (first | second).sum(axis=(1, 2))
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0).astype(np.float32)


def relative_difference(expected: Arrays, found: Arrays) -> float:
    """Largest difference of any tensor, each relative to its largest value; NaN if a value is not finite."""
    worst = 0.0
    for name, values in expected.items():
        reference = np.asarray(values, np.float32)
        if not reference.size:
            continue
        gap = np.abs(reference - np.asarray(found[name], np.float32)).max()
        worst = float(np.maximum(worst, gap / max(float(np.abs(reference).max()), 1e-12)))
    return worst


def relative_error(expected: Arrays, found: Arrays) -> float:
    """Largest root mean square of a tensor's difference, relative to the tensor's own; NaN if a value is not finite."""
    worst = 0.0
    for name, values in expected.items():
        reference = np.asarray(values, np.float64)
        if reference.size:
            gap = np.square(reference - np.asarray(found[name], np.float64)).mean()
            worst = float(np.maximum(worst, np.sqrt(gap / max(float(np.square(reference).mean()), 1e-24))))
    return worst


def set_distance(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    """Largest distance of a box of either set to the nearest of the other, in pixels; inf if one is empty."""
    if len(first) == 0 or len(second) == 0:
        return 0.0 if len(first) == len(second) else float("inf")
    distance = np.stack([np.abs(first - box).max(axis=1) for box in second], axis=1)
    return float(max(distance.min(axis=0).max(), distance.min(axis=1).max()))


def quantile(values: npt.NDArray[np.floating[Any]], share: float) -> float:
    """The value that `share` of the values do not exceed: the largest for 1; 0 for no values."""
    return float(np.quantile(values, share)) if values.size else 0.0


def lower_quantile(values: npt.NDArray[np.floating[Any]], share: float) -> float:
    """The value that `share` of the values reach: the smallest for 1; 1 for no values."""
    return 1.0 - quantile(1.0 - values, share)


def mean(values: npt.NDArray[np.floating[Any]]) -> float:
    """0 for no values."""
    return float(values.mean()) if values.size else 0.0

"""What eager mode finds in an image, and how far a run of the graph is from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from norton_deploy.parity.comparison import lower_quantile, mask_iou, mean, pair_detections, quantile
from norton_deploy.parity.keypoint_loss import KeypointLoss, keypoint_loss
from norton_deploy.parity.report import ParityReport, Tolerances
from norton_deploy.structures import Detections

SAMPLE = 32
"""Of how many detections per image eager mode computes masks and keypoints; with all, they take most of the time."""
GRID_PX = 0.05
"""A keypoint lies at the centre of a pixel of its box, to rounding of coordinates."""


@dataclass(frozen=True)
class Reference:
    """What eager mode finds in one image.

    Attributes:
        detections: boxes, scores and labels, in pixels of the graph's canvas.
        sample: [S], falling in score: those that have the following.
        masks: bool [S, H, W], or None.
        undecided: bool [S, H, W], pixels that a difference within the limits could change; None where all are judged.
        heatmaps: float32 [S, K, M, M], or None.
        by_probability: whether a keypoint's score is the exponential of its heatmap's value.
    """

    detections: Detections
    sample: npt.NDArray[np.int64]
    masks: npt.NDArray[np.bool_] | None = None
    undecided: npt.NDArray[np.bool_] | None = None
    heatmaps: npt.NDArray[np.float32] | None = None
    by_probability: bool = False


@dataclass(frozen=True)
class Example:
    """Attributes: an image of the graph's input size, uint8 RGB [H, W, 3], and what eager mode finds in it."""

    frame: npt.NDArray[np.uint8]
    reference: Reference


def thinned(count: int) -> npt.NDArray[np.int64]:
    """At most `SAMPLE` of `count` indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).round().astype(np.int64))


def compare_detections(
    report: ParityReport,
    name: str,
    expected: Sequence[Reference],
    found: Sequence[Detections],
    limits: Tolerances,
    *,
    score_threshold: float,
    max_detections: int,
) -> None:
    """All measures of the detections that any predictor `found` on the canvas, as stage `name`.

    Unmatched ones are excused where they lie at the cuts: the model's threshold, and the last place of a full list.
    """
    worst, lowest = partial(quantile, share=limits.share), partial(lower_quantile, share=limits.share)
    for reference, theirs in zip(expected, found, strict=True):
        ours = reference.detections
        pairing = pair_detections(
            ours,
            theirs,
            score_threshold=score_threshold,
            max_detections=max_detections,
            score_tolerance=limits.score,
        )
        report.count("boxes", len(pairing.pairs))
        unexplained = np.zeros(len(ours) + len(theirs), np.float32)
        unexplained[: pairing.unmatched - pairing.borderline] = 1.0
        report.pool(name, "share of unmatched detections", unexplained, limits.unmatched, mean)
        if limits.box_iou is None:
            report.pool(name, "box distance, px", pairing.box_px, limits.box_px, worst)
        else:
            report.pool(name, "box IoU", pairing.box_iou, limits.box_iou, lowest, is_lower_bound=True)
        report.pool(name, "score difference", pairing.score, limits.score, worst)
        first, second = pairing.pairs[np.isin(pairing.pairs[:, 0], reference.sample)].T
        place = np.searchsorted(reference.sample, first)
        if reference.masks is not None and theirs.masks is not None:
            record_masks(report, name, reference, place, theirs.masks[second], limits)
        if reference.heatmaps is not None and theirs.keypoints is not None:
            points = theirs.keypoints[second]
            judged = keypoint_loss(reference.heatmaps[place], theirs.boxes[second], points[..., :2])
            record_keypoints(report, name, judged, points[..., 2], reference.by_probability, limits)


def record_masks(
    report: ParityReport,
    name: str,
    reference: Reference,
    place: npt.NDArray[np.int64],
    theirs: npt.NDArray[np.bool_],
    limits: Tolerances,
) -> None:
    """Masks at a `place` [P] of the reference and their partners [P, H, W] as stage `name`, by their decided pixels.

    How much of either mask was left out is reported; a mask of which nothing is left was not compared.
    """
    assert reference.masks is not None
    ours = reference.masks[place]
    left_out = np.zeros_like(ours) if reference.undecided is None else reference.undecided[place]
    either = ours | theirs
    area, judged = (part.sum(axis=(1, 2)) for part in (either, either & ~left_out))
    report.count("masks", int(((judged > 0) | (area == 0)).sum()))
    iou = mask_iou(ours & ~left_out, theirs & ~left_out)
    lowest = partial(lower_quantile, share=limits.share)
    report.pool(name, "mask IoU", iou, limits.mask_iou, lowest, is_lower_bound=True)
    report.record(name, "share of a mask left out", quantile(1 - judged / np.maximum(area, 1), 1.0), None)


def record_keypoints(
    report: ParityReport,
    name: str,
    judged: KeypointLoss,
    scores: npt.NDArray[np.float32],
    by_probability: bool,
    limits: Tolerances,
) -> None:
    """Keypoints with their `scores` [N, K] as stage `name`; the distance to the maximum is reported, not judged."""
    report.count("keypoints", len(scores))
    expected, spread = (np.exp(judged.value), 1.0) if by_probability else (judged.value, judged.spread)
    difference = np.abs(scores - expected) / spread
    worst = partial(quantile, share=limits.share)
    report.pool(name, "heatmap loss at keypoint", judged.loss.ravel(), limits.keypoint_loss, worst)
    report.pool(name, "keypoint off its grid, px", judged.off_grid_px.ravel(), GRID_PX, worst)
    report.pool(name, "keypoint score difference", difference.ravel(), limits.keypoint_loss, worst)
    report.record(name, "keypoint to maximum, px", quantile(judged.distance_px, 1.0), None)

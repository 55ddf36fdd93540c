"""Each stage of an exported graph against eager mode, which starts from the graph's own input to that stage."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from norton_deploy.export.letterbox import Letterbox
from norton_deploy.inference.predictor import Image
from norton_deploy.inference.static_graph import decode_outputs
from norton_deploy.masks import MaskPaste
from norton_deploy.parity.comparison import Arrays, quantile, relative_difference, relative_error, set_distance
from norton_deploy.parity.eager_stages import EagerStages, doubled
from norton_deploy.parity.keypoint_loss import keypoint_loss
from norton_deploy.parity.references import Reference, compare_detections, record_keypoints, thinned
from norton_deploy.parity.report import ParityReport, Tolerances
from norton_deploy.structures import Detections

T = TypeVar("T")
RANKED = 1000
"""Of each level, how many of the best scores must differ for their order to mean anything."""
TIE = 1e-6
"""Scores tie that differ by at most this share of the largest ..."""
TIED_SHARE = 0.02
"""... and an image is left out if more than this share of its scores tie."""
BOX_OUTPUTS = ("num_detections", "boxes", "scores", "labels")


def compare_layers(report: ParityReport, eager: EagerStages, canvas: Image, stages: Arrays, limits: Tolerances) -> None:
    """From pixels uint8 [B, H, W, 3] to class logits: all that depends on weights, but for masks and keypoints."""
    for name, tensors in (
        ("backbone", eager.backbone(canvas)),
        ("fpn", eager.fpn(stages)),
        ("rpn", eager.rpn_head(stages)),
    ):
        record_tensors(report, name, tensors, stages, limits)
    record_tensors(report, "boxes", eager.box_head(stages), stages, limits)


def record_tensors(report: ParityReport, name: str, expected: Arrays, found: Arrays, limits: Tolerances) -> None:
    """How far the tensors of a stage are apart."""
    if limits.by_mean_square:
        report.record(name, "relative root mean square", relative_error(expected, found), limits.tensor)
    else:
        report.record(name, "largest relative difference", relative_difference(expected, found), limits.tensor)


def compare_proposals(
    report: ParityReport,
    name: str,
    eager: EagerStages,
    stages: Arrays,
    limits: Tolerances,
    judged: npt.NDArray[np.bool_],
) -> None:
    """From the RPN's logits and deltas to proposals, as stage `name`, of the images [B] that are `judged`."""
    for index in np.flatnonzero(judged):
        one = {key: value[index : index + 1] for key, value in stages.items() if key.startswith(("rpn_", "fpn."))}
        expected = eager.proposals(one)[0]
        found = np.asarray(stages["proposals"][index][stages["proposal_valid"][index]], np.float32)
        report.record(name, "distance to nearest, px", set_distance(expected, found), limits.box_px)
        report.count("proposals", len(expected))


def tied(stages: Arrays) -> npt.NDArray[np.bool_]:
    """Whether many of an image's best RPN scores are equal to rounding, as everywhere on a blank one; [B]."""
    ties, places = 0, 0
    for name, values in stages.items():
        if name.startswith("rpn_logits."):
            logits = np.sort(values.reshape(len(values), -1), axis=1)[:, -RANKED:].astype(np.float32)
            ties = ties + (np.diff(logits) <= TIE * np.abs(logits).max(axis=1, keepdims=True)).sum(axis=1)
            places += logits.shape[1]
    return np.asarray(ties > TIED_SHARE * places)


def compare_selection(
    report: ParityReport,
    name: str,
    eager: EagerStages,
    stages: Arrays,
    outputs: Arrays,
    limits: Tolerances,
    judged: npt.NDArray[np.bool_],
) -> None:
    """From proposals, logits and deltas to detections of the images that are `judged`, as stage `name`.

    `outputs` and `stages` are of one run.
    """
    found = decoded({output: outputs[output] for output in BOX_OUTPUTS}, eager, "whole_pixels")
    expected = [Reference(detections, thinned(0)) for detections in eager.detections(stages)]
    compare_detections(report, name, chosen(expected, judged), chosen(found, judged), limits, **eager.cuts)


def compare_task(
    report: ParityReport,
    eager: EagerStages,
    stages: Arrays,
    outputs: Arrays,
    limits: Tolerances,
    *,
    prefix: str = "",
    decoding: Tolerances | None = None,
) -> None:
    """From pyramid, boxes and labels to masks or keypoints, of a sample of the detections of one run.

    Args:
        decoding: limits of what starts from heatmaps, if others than `limits`.
    """
    rows = np.flatnonzero(np.asarray(outputs["labels"]) > 0)
    rows = rows[thinned(len(rows))]
    image, place = np.divmod(rows, outputs["labels"].shape[1])
    boxes = np.asarray(outputs["boxes"], np.float32)
    by_image = [boxes[index, place[image == index]] for index in range(len(boxes))]
    if "masks" in outputs:
        labels = outputs["labels"].reshape(-1)[rows].clip(0, max(eager.labels))
        size = outputs["masks"].shape[-1]
        gap = outputs["masks"].reshape(-1, size, size)[rows] - eager.masks(stages, by_image, labels)
        report.count("masks", len(rows))
        name = f"{prefix}masks"
        report.record(name, "probability difference", quantile(np.abs(gap), limits.share), limits.mask_probability)
        mean = abs(float(gap.mean())) if gap.size else 0.0
        report.record(name, "mean probability difference", mean, limits.mask_mean)
    if "keypoints" in outputs:
        heatmaps = doubled(stages["heatmaps"][rows])
        wanted = {"heatmaps": eager.heatmaps(stages, by_image)}
        record_tensors(report, f"{prefix}heatmaps", wanted, {"heatmaps": heatmaps}, limits)
        points = outputs["keypoints"].reshape(-1, *outputs["keypoints"].shape[2:])[rows]
        judged = keypoint_loss(heatmaps, boxes.reshape(-1, 4)[rows], points[..., :2])
        name = f"{prefix}keypoints"
        record_keypoints(report, name, judged, points[..., 2], eager.by_probability, decoding or limits)


def chosen(values: Sequence[T], judged: npt.NDArray[np.bool_]) -> list[T]:
    """Those of a batch that are `judged`."""
    return [value for value, keep in zip(values, judged, strict=True) if keep]


def decoded(outputs: Arrays, eager: EagerStages, mask_paste: MaskPaste) -> list[Detections]:
    """The predictor's decoding of a batch, in canvas pixels, of all labels, whether they have a category or not."""
    return decode_all(outputs, eager.image_size, eager.labels, mask_paste)


def decode_all(
    outputs: Arrays, canvas_size: tuple[int, int], labels: Sequence[int], mask_paste: MaskPaste
) -> list[Detections]:
    """The predictor's decoding of each image of a batch as it lies on a canvas of (height, width)."""
    frame, rows = Letterbox.fit(canvas_size, canvas_size), range(len(outputs["boxes"]))
    return [decode_outputs(outputs, index, frame, labels, mask_paste) for index in rows]


def to_canvas(outputs: Arrays, letterbox: Letterbox) -> Arrays:
    """A resizing graph's outputs with boxes and keypoints in canvas pixels instead of the frame's."""
    x_factor, y_factor = letterbox.factors
    changed = {"boxes": outputs["boxes"] / np.array([x_factor, y_factor] * 2, np.float32)}
    if "keypoints" in outputs:
        changed["keypoints"] = outputs["keypoints"] / np.array([x_factor, y_factor, 1], np.float32)
    return outputs | changed

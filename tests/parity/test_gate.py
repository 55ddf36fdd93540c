"""Pairing of detections and the parity report; whole graphs are compared in tests/export/test_onnx_export.py."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from norton_deploy.errors import UserError
from norton_deploy.export.contract import Precision
from norton_deploy.parity.comparison import (
    Pairing,
    box_iou,
    pair_detections,
    quantile,
    relative_difference,
    relative_error,
    set_distance,
)
from norton_deploy.parity.references import Reference, compare_detections
from norton_deploy.parity.report import TOLERANCES, ParityReport
from norton_deploy.structures import Detections


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64)
    return Detections(*arrays, (100, 100))


def pair(first: Detections, second: Detections, **changes: float) -> Pairing:
    settings = {"score_threshold": 0.05, "max_detections": 3, "score_tolerance": 1e-3, **changes}
    return pair_detections(first, second, **settings)  # type: ignore[arg-type]


A, B, C = [10.0, 10, 30, 30], [11.0, 10, 30, 30], [60.0, 60, 90, 80]


def test_pairs_by_label_and_box_not_by_position() -> None:
    first = detections([A, B, C], [0.9, 0.8, 0.7], [1, 2, 1])
    second = detections([C, [11, 10, 30, 30.5], A], [0.95, 0.8, 0.6], [1, 2, 1])
    pairing = pair(first, second)
    assert sorted(map(tuple, pairing.pairs.tolist())) == [(0, 2), (1, 1), (2, 0)]
    assert pairing.unmatched == 0
    assert pairing.box_px.max() == pytest.approx(0.5)
    assert pairing.box_iou.min() == pytest.approx(380 / 389.5)
    assert pairing.score.max() == pytest.approx(0.3, abs=1e-6)
    assert pairing.mask_iou is None and pairing.keypoint_px is None


def test_another_label_or_place_is_no_partner_and_only_cuts_excuse_it() -> None:
    first, second = detections([A, C], [0.9, 0.5], [1, 1]), detections([A, C], [0.9, 0.5], [2, 1])
    pairing = pair(first, second)
    assert (len(pairing.pairs), pairing.unmatched, pairing.borderline) == (1, 2, 0)
    assert pair(first, second, max_detections=2).borderline == 0
    at_threshold = detections([A, C], [0.9, 0.0504], [1, 1])
    assert pair(at_threshold, detections([A], [0.9], [1])).borderline == 1
    last_place = detections([A, C], [0.9, 0.4], [1, 1]), detections([A, B], [0.9, 0.4004], [1, 3])
    assert pair(*last_place, max_detections=2).borderline == 2
    empty = detections([], [], [])
    assert pair(empty, first).unmatched == 2 and pair(empty, empty).unmatched == 0


def test_iou_and_distances() -> None:
    boxes = np.array([A, C], np.float32)
    assert box_iou(boxes, boxes)[0].tolist() == [1.0, 0.0]
    assert set_distance(boxes, boxes[::-1]) == 0.0
    assert set_distance(boxes, boxes[:1]) == 60.0
    assert set_distance(boxes, boxes[:0]) == float("inf") and set_distance(boxes[:0], boxes[:0]) == 0.0
    assert relative_difference({"x": np.array([4.0, -8.0])}, {"x": np.array([4.0, -7.0])}) == 0.125
    assert relative_error({"x": np.array([3.0, -4.0])}, {"x": np.array([3.0, -3.5])}) == 0.1
    assert np.isnan(relative_error({"x": np.array([1.0])}, {"x": np.array([np.nan])}))
    assert np.isnan(relative_difference({"x": np.array([1.0])}, {"x": np.array([np.nan])}))
    assert quantile(np.arange(11.0), 0.9) == 9.0 and quantile(np.zeros(0), 1.0) == 0.0


def test_report_keeps_the_worst_and_names_the_first_failure() -> None:
    report = ParityReport("m.onnx", "fp32")
    report.record("rpn", "gap", 0.1, 1.0)
    report.record("final", "IoU", 0.995, 0.99, is_lower_bound=True)
    report.record("compared", "pairs of boxes", 2701, 20, is_lower_bound=True)
    report.require()
    assert " 2701 " in report.table()
    report.record("final", "IoU", 0.5, 0.99, is_lower_bound=True)
    report.record("rpn", "gap", 3.0, 1.0)
    report.record("rpn", "gap", 0.2, 1.0)
    with pytest.raises(UserError, match="first in stage 'rpn': gap 3, expected at most 1"):
        report.require()
    assert "OFF" in report.table() and report.to_dict()["passed"] is False
    report.record("rpn", "gap", float("nan"), 1.0)
    report.record("rpn", "gap", 0.0, 1.0)
    assert np.isnan(report.stages[0].worst) and not report.stages[0].passed


def test_fp32_limits_are_those_the_project_promises() -> None:
    limits = TOLERANCES["fp32"]
    assert (limits.box_px, limits.score, limits.mask_iou, limits.keypoint_loss) == (0.05, 1e-4, 0.99, 1e-3)
    assert (limits.share, limits.unmatched) == (1.0, 0.0)


def masks_report(undecided: slice, flipped: slice) -> ParityReport:
    """Of a mask of ten columns in which some are flipped."""
    found = detections([A], [0.9], [1])
    ours = np.zeros((1, 100, 100), bool)
    ours[:, 10:30, 10:20] = True
    theirs, open_pixels = ours.copy(), np.zeros_like(ours)
    theirs[..., flipped] = ~theirs[..., flipped] & (np.arange(100) < 30)[:, None] & (np.arange(100) >= 10)[:, None]
    open_pixels[..., undecided] = True
    report = ParityReport("m.onnx", "fp32")
    reference = Reference(found, np.zeros(1, np.int64), ours, open_pixels)
    given = replace(found, masks=theirs)
    compare_detections(
        report, "final", [reference], [given], TOLERANCES["fp32"], score_threshold=0.05, max_detections=3
    )
    return report


def test_masks_are_judged_where_rounding_does_not_decide() -> None:
    nothing = slice(0)
    assert not masks_report(nothing, slice(18, 20)).passed
    assert not masks_report(slice(19, 20), slice(18, 20)).passed
    report = masks_report(slice(18, 20), slice(18, 20))
    assert report.passed and report.compared["masks"] == 1
    assert next(stage.worst for stage in report.stages if "left out" in stage.measure) == pytest.approx(0.2)
    assert masks_report(slice(10, 20), slice(10, 20)).compared["masks"] == 0


def shifted_report(precision: Precision, moved: Sequence[int], per_image: Sequence[int]) -> ParityReport:
    """Images of so many boxes each, of which so many lie 4 px off in the second run."""
    report = ParityReport("m.onnx", precision)
    for wrong, count in zip(moved, per_image, strict=True):
        first = detections(
            [[30.0 * index, 10, 30.0 * index + 20, 40] for index in range(count)], [0.9] * count, [1] * count
        )
        boxes = first.boxes.copy()
        boxes[:wrong, 1] += 4.0
        compare_detections(
            report, "final", [Reference(first, np.zeros(0, np.int64))], [replace(first, boxes=boxes)],
            TOLERANCES[precision], score_threshold=0.05, max_detections=100,
        )  # fmt: skip
    return report


def test_a_share_of_the_detections_is_that_of_all_images() -> None:
    assert shifted_report("fp16", [1, 0, 0], [8, 6, 7]).passed  # one of eight in one image, one of 21 in all
    assert not shifted_report("fp16", [1, 1, 1], [8, 6, 7]).passed
    assert not shifted_report("fp16", [0, 0, 3], [8, 6, 7]).passed
    assert not shifted_report("fp32", [1, 0, 0], [80, 60, 70]).passed
    report = shifted_report("fp16", [1, 0, 0], [8, 6, 7])
    assert set(report.to_dict()) == {
        "graph", "precision", "images", "detections", "stages", "compared", "inexact", "passed"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("side", "moved", "passes"), [(20, 2, True), (20, 3, False), (200, 20, True), (200, 30, False)]
)
def test_boxes_in_8_bits_are_held_to_their_overlap(side: float, moved: float, passes: bool) -> None:
    first = detections([[0, 0, side, side]], [0.9], [1])
    second = detections([[moved, 0, side + moved, side]], [0.9], [1])
    report = ParityReport("m.onnx", "int8")
    compare_detections(
        report, "final", [Reference(first, np.zeros(0, np.int64))], [second],
        TOLERANCES["int8"], score_threshold=0.05, max_detections=100,
    )  # fmt: skip
    assert report.passed is passes
    assert [stage.worst for stage in report.stages if stage.measure == "box IoU"] == [
        pytest.approx((side - moved) / (side + moved))
    ]


def test_the_share_without_a_partner_is_that_of_all_images() -> None:
    many, few = detections([A, B, C] * 10, [0.9] * 30, list(range(30))), detections([A], [0.9], [1])
    nothing = detections([], [], [])

    def verdict(*runs: tuple[Detections, Detections]) -> bool:
        report = ParityReport("m.onnx", "fp16")
        for ours, theirs in runs:
            compare_detections(
                report, "final", [Reference(ours, np.zeros(0, np.int64))], [theirs],
                TOLERANCES["fp16"], score_threshold=0.05, max_detections=100,
            )  # fmt: skip
        return report.passed

    assert verdict((many, many), (few, nothing))
    assert not verdict((few, nothing))
    assert not verdict((many, many), (many, nothing))

"""The parity gate: does an exported graph compute what the model computes in eager mode, and if not, from where on?

The shipped file itself is run. Its tensors between the stages are read by declaring them as outputs of a copy
in memory; each stage in eager mode starts from the graph's own input to that stage.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.errors import UserError
from norton_deploy.export.letterbox import Letterbox
from norton_deploy.export.onnx_export import STAGE_PREFIX, read_contract
from norton_deploy.inference.mask_paste import paste_masks
from norton_deploy.parity.detection_matching import Pairing, pair_detections
from norton_deploy.parity.eager_stages import Arrays, EagerStages, doubled, without_resize
from norton_deploy.parity.inputs import (
    Image,
    as_planes,
    canvas_stages,
    canvases,
    resize_difference,
    to_canvas,
)
from norton_deploy.parity.keypoint_ties import keypoint_distances
from norton_deploy.parity.staged_graph import cpu_session, run, with_stage_outputs
from norton_deploy.structures import Detections, MaskPaste

RESIZE_LEVELS = 1.0
"""How far a graph's own resizing may be from the predictor's, in levels of 255."""


@dataclass(frozen=True)
class Tolerances:
    """How far a graph may be from eager mode.

    Attributes:
        tensor: largest difference of a feature map, logit or delta, relative to the largest value.
        box_px, score, mask_iou, keypoint_px: for pairs of detections.
        mask_probability: for pixels of box-local masks.
        share: of the pairs (or pixels) of an image, how many must be within these limits.
        unmatched: share of detections that may lack a partner (those at a cut are not counted).
    """

    tensor: float
    box_px: float
    score: float
    mask_iou: float
    mask_probability: float
    keypoint_px: float
    share: float
    unmatched: float


TOLERANCES = {
    "fp32": Tolerances(1e-4, 0.05, 1e-4, 0.99, 1e-3, 1.0, share=1.0, unmatched=0.0),
    # Rounding to 11 bits moves single decisions (an NMS winner, the higher of two peaks) by any distance, so
    # fp16 is held to what 9 of 10 detections do.
    "fp16": Tolerances(2e-2, 1.0, 0.02, 0.90, 0.05, 2.0, share=0.9, unmatched=0.1),
}


@dataclass
class StageResult:
    """The largest difference seen in one stage.

    Attributes:
        name: resize, backbone, fpn, rpn, proposals, boxes, detections, masks, heatmaps, keypoints or final.
        measure: what is compared, with its unit.
        worst: over all images.
        limit: what is allowed; a lower bound for IoU, an upper bound for everything else.
        is_lower_bound: which of the two.
    """

    name: str
    measure: str
    worst: float
    limit: float
    is_lower_bound: bool = False

    @property
    def passed(self) -> bool:
        """Whether the limit holds (NaN never does)."""
        return self.worst >= self.limit if self.is_lower_bound else self.worst <= self.limit


@dataclass
class ParityReport:
    """Attributes: the file; images compared; detections compared; results in the order of the stages; images for
    which a static shortcut of the graph was not exact, by flag."""

    graph: str
    precision: str
    images: int = 0
    detections: int = 0
    stages: list[StageResult] = field(default_factory=list)
    inexact: dict[str, int] = field(default_factory=lambda: {"nms_converged": 0, "candidates_complete": 0})

    @property
    def first_failure(self) -> StageResult | None:
        """The first stage that is off."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def passed(self) -> bool:
        """Whether all stages are within their limits."""
        return self.first_failure is None

    def record(self, name: str, measure: str, value: float, limit: float, is_lower_bound: bool = False) -> None:
        """Add a value to a stage; the worst is kept."""
        for stage in self.stages:
            if (stage.name, stage.measure) == (name, measure):
                worse = min(stage.worst, value) if is_lower_bound else max(stage.worst, value)
                stage.worst = float("nan") if np.isnan([stage.worst, value]).any() else worse
                return
        self.stages.append(StageResult(name, measure, value, limit, is_lower_bound))

    def require(self) -> None:
        """Raise a UserError that names the first stage that is off."""
        bad = self.first_failure
        if bad is not None:
            relation = "at least" if bad.is_lower_bound else "at most"
            raise UserError(
                f"{self.graph}: differs from eager mode, first in stage '{bad.name}': {bad.measure} "
                f"{bad.worst:.3g}, expected {relation} {bad.limit:g}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        stages = [asdict(stage) | {"passed": stage.passed} for stage in self.stages]
        return asdict(self) | {"stages": stages, "passed": self.passed}

    def table(self) -> str:
        """One line per stage, for people."""
        lines = [f"{'stage':<12}{'measure':<34}{'worst':>10}   {'limit':>8}"]
        for stage in self.stages:
            sign, verdict = (">=" if stage.is_lower_bound else "<="), ("" if stage.passed else "  OFF")
            lines.append(f"{stage.name:<12}{stage.measure:<34}{stage.worst:>10.3g} {sign}{stage.limit:>8g}{verdict}")
        for flag, count in self.inexact.items():
            if count:
                lines.append(f"warning: {flag} was false in {count} batches; the graph's shortcut was not exact there")
        return "\n".join(lines)


@torch.no_grad()
def check_parity(
    model: GeneralizedRCNN,
    onnx_path: str | Path,
    images: Sequence[Image],
    *,
    tolerances: Tolerances | None = None,
) -> ParityReport:
    """Compare an exported graph, run by ONNX Runtime on the CPU, with its model in eager mode.

    Args:
        model: the detector that was exported, in eval mode, on the CPU, before any lowering; not changed.
        onnx_path: the graph.
        images: uint8 RGB [H, W, 3]; any size, they are letterboxed into the graph's. Where the graph resizes its
            input itself, its result is compared with the predictor's letterbox, and is what eager mode is given.
        tolerances: by default those of the graph's precision.

    Raises:
        UserError: no images, or a file that `export_onnx` did not write.
    """
    if not images:
        raise UserError("parity: no images to compare on")
    contract = read_contract(onnx_path)
    report = ParityReport(str(onnx_path), contract["precision"])
    limits = tolerances or TOLERANCES[contract["precision"]]
    height, width = contract["image_size"]
    reference = without_resize(model, (height, width), contract["max_detections"])
    eager = EagerStages(reference, (height, width))
    session = cpu_session(Path(onnx_path).read_bytes())
    staged = cpu_session(with_stage_outputs(onnx_path))
    resizes = contract["resize"] == "graph"
    input_size = contract["input_size"][0], contract["input_size"][1]
    for batch in canvases(images, contract["batch"], input_size):
        fed = batch if contract["input"]["dtype"] == "uint8" else as_planes(batch)
        outputs = run(session, contract["input"]["name"], fed)
        everything = run(staged, contract["input"]["name"], fed)
        stages = {
            name.removeprefix(STAGE_PREFIX): value
            for name, value in everything.items()
            if name.startswith(STAGE_PREFIX)
        }
        if resizes:
            canvas = stages["canvas"]
            report.record("resize", "difference, levels", resize_difference(batch, canvas), RESIZE_LEVELS)
            batch = canvas.astype(np.uint8)
            everything |= canvas_stages(stages)
            outputs = to_canvas(outputs, Letterbox.fit(input_size, (height, width)))
        ambiguous = compare_stages(report, eager, batch, stages, everything, limits)
        compare_final(report, eager, batch, outputs, contract, limits, ambiguous)
        report.images += len(batch)
        for flag in report.inexact:
            report.inexact[flag] += int(not outputs[flag].all())
    return report


def compare_stages(
    report: ParityReport, eager: EagerStages, batch: Image, stages: Arrays, outputs: Arrays, limits: Tolerances
) -> npt.NDArray[np.bool_] | None:
    """Every stage from the graph's input to it; `outputs` and `stages` are of the same run.

    Returns:
        With keypoints: which have several maxima, [B, D, K].
    """
    for name, expected in (
        ("backbone", eager.backbone(batch)),
        ("fpn", eager.fpn(stages)),
        ("rpn", eager.rpn_head(stages)),
    ):
        report.record(name, "largest relative difference", relative_difference(expected, stages), limits.tensor)
    for expected_boxes, boxes, valid in zip(
        eager.proposals(stages), stages["proposals"], stages["proposal_valid"], strict=True
    ):
        distance = set_distance(expected_boxes, np.asarray(boxes[valid], np.float32))
        report.record("proposals", "distance to nearest, px", distance, limits.box_px)
    difference = relative_difference(eager.box_head(stages), stages)
    report.record("boxes", "largest relative difference", difference, limits.tensor)
    for index, expected_detections in enumerate(eager.detections(stages)):
        found = detections_of(outputs, index, eager.image_size, paste=False)
        pairing = pair(eager, expected_detections, found, limits)
        record_pairing(report, "detections", pairing, len(expected_detections) + len(found), limits)
    real = np.asarray(outputs["labels"]).reshape(-1) > 0
    if "masks" in outputs:
        size = outputs["masks"].shape[-1]
        gap = np.abs(eager.masks(stages, outputs) - outputs["masks"].reshape(-1, size, size))[real]
        report.record("masks", "probability difference", quantile(gap, limits.share), limits.mask_probability)
    if "keypoints" in outputs:
        heatmaps = doubled(stages["heatmaps"][real])
        gap_relative = relative_difference({"heatmaps": eager.heatmaps(stages, outputs)[real]}, {"heatmaps": heatmaps})
        report.record("heatmaps", "largest relative difference", gap_relative, limits.tensor)
        points = outputs["keypoints"].reshape(-1, *outputs["keypoints"].shape[2:])[real][..., :2]
        boxes = outputs["boxes"].reshape(-1, 4)[real]
        gap, ties = keypoint_distances(heatmaps, boxes, points, limits.keypoint_px)
        report.record("keypoints", "distance, px", quantile(gap, limits.share), limits.keypoint_px)
        ambiguous = np.zeros((len(real), points.shape[1]), bool)
        ambiguous[real] = ties
        return ambiguous.reshape(*outputs["labels"].shape, -1)
    return None


def compare_final(
    report: ParityReport,
    eager: EagerStages,
    batch: Image,
    outputs: Arrays,
    contract: dict[str, Any],
    limits: Tolerances,
    ambiguous: npt.NDArray[np.bool_] | None,
) -> None:
    """The detections of the whole graph against those of the whole model; `ambiguous` keypoints may differ."""
    for index, expected in enumerate(eager.whole(batch)):
        found = detections_of(outputs, index, eager.image_size, mask_paste=contract["mask_paste"])
        pairing = pair(eager, expected, found, limits)
        if ambiguous is not None and pairing.keypoint_px is not None:
            pairing.keypoint_px[ambiguous[index, pairing.pairs[:, 1]]] = 0.0
        report.detections += len(found)
        record_pairing(report, "final", pairing, len(expected) + len(found), limits)


def pair(eager: EagerStages, expected: Detections, found: Detections, limits: Tolerances) -> Pairing:
    """Pair with the model's own cuts."""
    heads = eager.model.roi_heads
    return pair_detections(
        expected,
        found,
        score_threshold=heads.score_thresh,
        max_detections=heads.detections_per_img,
        score_tolerance=limits.score,
    )


def record_pairing(report: ParityReport, name: str, pairing: Pairing, total: int, limits: Tolerances) -> None:
    """All measures of one image's pairing."""
    unexplained = (pairing.unmatched - pairing.borderline) / max(total, 1)
    report.record(name, "share of unmatched detections", unexplained, limits.unmatched)
    share = limits.share
    report.record(name, "box distance, px", quantile(pairing.box_px, share), limits.box_px)
    report.record(name, "score difference", quantile(pairing.score, share), limits.score)
    if pairing.mask_iou is not None:
        lowest = 1.0 - quantile(1.0 - pairing.mask_iou, share)
        report.record(name, "mask IoU", lowest, limits.mask_iou, is_lower_bound=True)
    if pairing.keypoint_px is not None:
        report.record(name, "keypoint distance, px", quantile(pairing.keypoint_px, share), limits.keypoint_px)


def detections_of(
    outputs: Arrays,
    index: int,
    image_size: tuple[int, int],
    paste: bool = True,
    mask_paste: MaskPaste = "whole_pixels",
) -> Detections:
    """The detections of one image of a graph's batch; without masks and keypoints unless `paste`."""
    count = int(outputs["num_detections"][index])
    part = {name: np.asarray(outputs[name][index, :count]) for name in ("boxes", "scores", "labels")}
    masks = (
        paste_masks(outputs["masks"][index, :count], part["boxes"], image_size, mask_paste=mask_paste)
        if "masks" in outputs and paste
        else None
    )
    keypoints = np.asarray(outputs["keypoints"][index, :count]) if "keypoints" in outputs and paste else None
    return Detections(part["boxes"], part["scores"], part["labels"].astype(np.int64), image_size, masks, keypoints)


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


def set_distance(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    """Largest distance of a box of either set to the nearest of the other, in pixels; inf if one is empty."""
    if len(first) == 0 or len(second) == 0:
        return 0.0 if len(first) == len(second) else float("inf")
    distance = np.stack([np.abs(first - box).max(axis=1) for box in second], axis=1)
    return float(max(distance.min(axis=0).max(), distance.min(axis=1).max()))


def quantile(values: npt.NDArray[np.floating[Any]], share: float) -> float:
    """The value that `share` of the values do not exceed: the largest for 1; 0 for no values."""
    return float(np.quantile(values, share)) if values.size else 0.0

"""The parity gate: does an exported graph compute what the model computes in eager mode, and if not, from where on?

The shipped file itself is run, by the predictor that will run it and with the predictor's own letterbox and decoding.
Its tensors between the stages are read by declaring them as outputs of a copy in memory; each stage in eager mode
starts from the graph's own input to that stage.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.cost.session import make_session
from norton_deploy.errors import UserError
from norton_deploy.export.letterbox import Letterbox, letterboxed
from norton_deploy.export.onnx_export import STAGE_PREFIX, read_contract, with_stage_outputs
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.predictor import Image
from norton_deploy.inference.static_graph import StaticGraphPredictor, decode_outputs, to_graph_input
from norton_deploy.parity.comparison import (
    Arrays,
    keypoint_distances,
    pair_detections,
    quantile,
    relative_difference,
    set_distance,
)
from norton_deploy.parity.eager_stages import EagerStages, doubled
from norton_deploy.structures import Detections, MaskPaste

RESIZE_LEVELS = 1.0
"""How far a graph's own resizing may be from the predictor's, in levels of 255."""


@dataclass(frozen=True)
class Tolerances:
    """How far a graph may be from eager mode.

    Attributes:
        tensor: largest difference of a feature map, logit or delta, relative to the largest value.
        box_px, score, mask_iou, keypoint_px, mask_probability: for pairs of detections, pixels of box-local masks.
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
        limit, is_lower_bound: what is allowed; a lower bound for IoU, an upper bound for everything else.
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
    """Attributes: the file; images and detections compared; stages; batches with an inexact shortcut, by flag."""

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
    predictor: StaticGraphPredictor | None = None,
    tolerances: Tolerances | None = None,
) -> ParityReport:
    """Compare an exported graph, run by ONNX Runtime on the CPU, with its model in eager mode.

    Args:
        model: the detector that was exported, in eval mode, on the CPU, before any lowering; not changed.
        onnx_path: the graph.
        images: uint8 RGB [H, W, 3]; any size, they are letterboxed into the graph's. The last batch is filled up from
            the first images. Where the graph resizes its input itself, its result is compared with the predictor's
            letterbox, and is what eager mode is given.
        predictor: what runs the whole graph for the last stage, by default ONNX Runtime on the CPU; an engine that was
            built from the graph is compared by giving it here.
        tolerances: by default those of the graph's precision.

    Raises:
        UserError: no images, a file that `export_onnx` did not write, or a predictor of another graph.
    """
    if not images:
        raise UserError("parity: no images to compare on")
    graph = predictor or OnnxRuntimePredictor(Path(onnx_path), device="cpu")
    contract = read_contract(onnx_path)
    if graph.contract != contract:
        raise UserError(f"{graph.name}: was not made from {onnx_path}")
    staged = make_session(with_stage_outputs(onnx_path), "cpu")
    names = [output.name for output in staged.get_outputs()]
    report = ParityReport(str(onnx_path), contract.precision)
    limits = tolerances or TOLERANCES[contract.precision]
    eager = EagerStages(model, contract.image_size, contract.max_detections)
    filled = [*images, *islice(cycle(images), -len(images) % contract.batch)]
    for start in range(0, len(filled), contract.batch):
        canvas = letterboxed(filled[start : start + contract.batch], contract.input_size)
        fed = to_graph_input(canvas, contract.input_dtype)
        outputs: Arrays = graph.run(fed)
        everything: Arrays = dict(zip(names, staged.run(names, {contract.input_name: fed}), strict=True))
        stages = {name.removeprefix(STAGE_PREFIX): everything.pop(name) for name in names if STAGE_PREFIX in name}
        if contract.resize == "graph":
            expected = letterboxed(list(canvas), contract.image_size)
            levels = float(np.abs(stages["canvas"] - expected).max())
            report.record("resize", "difference, levels", levels, RESIZE_LEVELS)
            canvas = stages["canvas"].astype(np.uint8)
            everything |= {n.removeprefix("canvas_"): value for n, value in stages.items() if n.startswith("canvas_")}
            outputs = to_canvas(outputs, Letterbox.fit(contract.input_size, contract.image_size))
        ambiguous = compare_stages(report, eager, canvas, stages, everything, limits)
        found = decoded(outputs, eager, contract.mask_paste)
        compare_detections(report, "final", eager, eager.whole(canvas), found, limits, ambiguous)
        report.images += len(canvas)
        report.detections += sum(map(len, found))
        for flag in report.inexact:
            report.inexact[flag] += int(not outputs[flag].all())
    return report


def to_canvas(outputs: Arrays, letterbox: Letterbox) -> Arrays:
    """A resizing graph's outputs with boxes and keypoints in canvas pixels instead of the frame's."""
    x_factor, y_factor = letterbox.factors
    changed = {"boxes": outputs["boxes"] / np.array([x_factor, y_factor] * 2, np.float32)}
    if "keypoints" in outputs:
        changed["keypoints"] = outputs["keypoints"] / np.array([x_factor, y_factor, 1], np.float32)
    return outputs | changed


def decoded(outputs: Arrays, eager: EagerStages, mask_paste: MaskPaste) -> list[Detections]:
    """The predictor's decoding of a batch, in canvas pixels, of all labels, whether they have a category or not."""
    frame, rows = Letterbox.fit(eager.image_size, eager.image_size), range(len(outputs["boxes"]))
    return [decode_outputs(outputs, index, frame, eager.labels, mask_paste) for index in rows]


def compare_stages(
    report: ParityReport, eager: EagerStages, batch: Image, stages: Arrays, outputs: Arrays, limits: Tolerances
) -> npt.NDArray[np.bool_] | None:
    """Every stage from the graph's input to it; `outputs` and `stages` are of the same run.

    Returns:
        With keypoints: which have several maxima, [B, D, K].
    """
    for name, tensors in (
        ("backbone", eager.backbone(batch)),
        ("fpn", eager.fpn(stages)),
        ("rpn", eager.rpn_head(stages)),
    ):
        report.record(name, "largest relative difference", relative_difference(tensors, stages), limits.tensor)
    for expected_boxes, boxes, valid in zip(
        eager.proposals(stages), stages["proposals"], stages["proposal_valid"], strict=True
    ):
        distance = set_distance(expected_boxes, np.asarray(boxes[valid], np.float32))
        report.record("proposals", "distance to nearest, px", distance, limits.box_px)
    difference = relative_difference(eager.box_head(stages), stages)
    report.record("boxes", "largest relative difference", difference, limits.tensor)
    before_task_head = {name: outputs[name] for name in ("num_detections", "boxes", "scores", "labels")}
    found = decoded(before_task_head, eager, "whole_pixels")
    compare_detections(report, "detections", eager, eager.detections(stages), found, limits)
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


def compare_detections(
    report: ParityReport,
    name: str,
    eager: EagerStages,
    expected: Sequence[Detections],
    found: Sequence[Detections],
    limits: Tolerances,
    ambiguous: npt.NDArray[np.bool_] | None = None,
) -> None:
    """All measures of the detections that any predictor `found` in images of `eager.image_size`, as stage `name`.

    Unmatched ones are excused where they lie at the model's own cuts; keypoints may differ where they are
    `ambiguous`, [B, D, K].
    """
    heads, share = eager.model.roi_heads, limits.share
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        pairing = pair_detections(
            ours,
            theirs,
            score_threshold=heads.score_thresh,
            max_detections=heads.detections_per_img,
            score_tolerance=limits.score,
        )
        unexplained = (pairing.unmatched - pairing.borderline) / max(len(ours) + len(theirs), 1)
        report.record(name, "share of unmatched detections", unexplained, limits.unmatched)
        report.record(name, "box distance, px", quantile(pairing.box_px, share), limits.box_px)
        report.record(name, "score difference", quantile(pairing.score, share), limits.score)
        if pairing.mask_iou is not None:
            lowest = 1.0 - quantile(1.0 - pairing.mask_iou, share)
            report.record(name, "mask IoU", lowest, limits.mask_iou, is_lower_bound=True)
        if pairing.keypoint_px is not None:
            if ambiguous is not None:
                pairing.keypoint_px[ambiguous[index, pairing.pairs[:, 1]]] = 0.0
            report.record(name, "keypoint distance, px", quantile(pairing.keypoint_px, share), limits.keypoint_px)

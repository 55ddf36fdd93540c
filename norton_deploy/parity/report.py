"""What the parity gate allows, and what it found: limits by precision, the worst value of each stage."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError
from norton_deploy.export.contract import Precision

Values = npt.NDArray[np.floating[Any]]
ENOUGH = 20
"""How many of an output's values must have been compared at least; a gate that compared nothing has not passed."""


@dataclass(frozen=True)
class Tolerances:
    """How far a graph may be from eager mode.

    Attributes:
        tensor: difference of a feature map, logit or delta: the largest, relative to the largest value, or ...
        by_mean_square: ... the root of the mean square, relative to the tensor's own.
        box_iou: of pairs of detections, instead of box_px: what few bits do to a box's deltas grows with the box.
        box_px, score, mask_iou, mask_probability: for pairs of detections, pixels of box-local masks.
        keypoint_loss: how far the heatmap's value at a keypoint may be below its maximum, and the keypoint's score
            from that value, relative to the heatmap's range.
        share: of the pairs of all images, or of a batch's mask pixels, how many must be within these limits.
        unmatched: share of all images' detections that may lack a partner (those at a cut are not counted).
    """

    tensor: float
    box_px: float
    score: float
    mask_iou: float
    mask_probability: float
    keypoint_loss: float
    share: float
    unmatched: float
    by_mean_square: bool = False
    box_iou: float | None = None

    @property
    def mask_mean(self) -> float:
        """How far the mean of all mask probabilities may be off: rounding has no direction."""
        return self.mask_probability / 10


TOLERANCES: dict[Precision, Tolerances] = {
    "fp32": Tolerances(1e-4, 0.05, 1e-4, 0.99, 1e-3, 1e-3, share=1.0, unmatched=0.0),
    # Rounding to 11 bits moves single decisions (an NMS winner, the higher of two peaks) by any distance, so
    # fp16 is held to what 9 of 10 detections do.
    "fp16": Tolerances(2e-2, 1.0, 0.02, 0.90, 0.05, 2e-2, share=0.9, unmatched=0.1),
    # A range that leaves tails out changes single values by any amount, hence mean squares; 0.3 is noise of a tenth of
    # the power, another layer's weights give 1 and more. Reasons and what was seen before: docs/decisions.md.
    "int8": Tolerances(0.3, 4.0, 0.1, 0.80, 0.2, 0.2, share=0.8, unmatched=0.2, by_mean_square=True, box_iou=0.80),
}
TOLERANCES["tf32"] = TOLERANCES["fp16"]  # the same mantissa; it holds for engines, the graph itself is in fp32
BF16 = Tolerances(5e-2, 4.0, 0.05, 0.85, 0.1, 5e-2, share=0.9, unmatched=0.1)
"""Of an engine that computes a graph of fp32 in bf16, 8 bits instead of fp16's 11."""


@dataclass
class StageResult:
    """The largest difference seen in one stage.

    Attributes:
        name: resize, backbone, fpn, rpn, proposals, boxes, detections, masks, heatmaps, keypoints, final or compared;
            "given" before it: on tensors that the gate made itself.
        measure: what is compared, with its unit.
        worst: over all images; of a share of the detections, what that share of all images' does not exceed.
        limit, is_lower_bound: what is allowed; a lower bound for IoU and counts, an upper bound for everything else;
            None for what is reported and not judged.
    """

    name: str
    measure: str
    worst: float
    limit: float | None
    is_lower_bound: bool = False

    @property
    def passed(self) -> bool:
        """Whether the limit holds (NaN never does)."""
        if self.limit is None:
            return True
        return self.worst >= self.limit if self.is_lower_bound else self.worst <= self.limit


@dataclass
class ParityReport:
    """What was compared and how far it is apart.

    Attributes:
        precision: whose limits hold.
        images, detections: given to the graph, and found by it.
        compared: pairs by output, boxes, masks or keypoints.
        inexact: batches with an inexact shortcut, by flag.
    """

    graph: str
    precision: str
    images: int = 0
    detections: int = 0
    stages: list[StageResult] = field(default_factory=list)
    compared: dict[str, int] = field(default_factory=dict)
    inexact: dict[str, int] = field(default_factory=lambda: {"nms_converged": 0, "candidates_complete": 0})
    _pooled: dict[tuple[str, str], Values] = field(default_factory=dict, init=False, repr=False)

    @property
    def first_failure(self) -> StageResult | None:
        """The first stage that is off."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def passed(self) -> bool:
        """Whether anything was compared and all stages are within their limits."""
        return bool(self.stages) and self.first_failure is None

    def record(self, name: str, measure: str, value: float, limit: float | None, is_lower_bound: bool = False) -> None:
        """Add a value to a stage; the worst is kept."""
        stage = self._stage(name, measure, value, limit, is_lower_bound)
        worse = min(stage.worst, value) if is_lower_bound else max(stage.worst, value)
        stage.worst = float("nan") if np.isnan([stage.worst, value]).any() else worse

    def pool(
        self,
        name: str,
        measure: str,
        values: Values,
        limit: float | None,
        judge: Callable[[Values], float],
        *,
        is_lower_bound: bool = False,
    ) -> None:
        """Add the values of an image's detections to those of the other images; what `judge` makes of all is kept.

        A share of the detections means little in one image: of eight, nine tenths are all.
        """
        pooled = np.concatenate([self._pooled.get((name, measure), values[:0]), values])
        self._pooled[name, measure] = pooled
        value = judge(pooled)
        self._stage(name, measure, value, limit, is_lower_bound).worst = value

    def _stage(self, name: str, measure: str, value: float, limit: float | None, is_lower_bound: bool) -> StageResult:
        """The stage of that name and measure; a new one has the value."""
        for stage in self.stages:
            if (stage.name, stage.measure) == (name, measure):
                return stage
        self.stages.append(StageResult(name, measure, value, limit, is_lower_bound))
        return self.stages[-1]

    def count(self, output: str, pairs: int) -> None:
        """Add to what was compared of an output."""
        self.compared[output] = self.compared.get(output, 0) + pairs

    def require_enough(self, *outputs: str) -> None:
        """Make it a failure that fewer than `ENOUGH` pairs of an output were compared."""
        for output in outputs:
            self.record("compared", f"pairs of {output}", self.compared.get(output, 0), ENOUGH, is_lower_bound=True)

    def require(self) -> None:
        """Raise a UserError that names the first stage that is off, or what was compared too little."""
        bad = self.first_failure
        if bad is None:
            return
        if bad.name == "compared":
            raise UserError(
                f"{self.graph}: not checked: {bad.worst:g} {bad.measure} were compared, expected at least "
                f"{bad.limit:g}; give images in which the model finds something"
            )
        relation = "at least" if bad.is_lower_bound else "at most"
        raise UserError(
            f"{self.graph}: differs from eager mode, first in stage '{bad.name}': {bad.measure} "
            f"{bad.worst:.3g}, expected {relation} {bad.limit:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        stages = [asdict(stage) | {"passed": stage.passed} for stage in self.stages]
        own = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        return own | {"stages": stages, "passed": self.passed}

    def table(self) -> str:
        """One line per stage, for people."""
        lines = [f"{'stage':<18}{'measure':<34}{'worst':>10}   {'limit':>8}"]
        for stage in self.stages:
            sign, verdict = (">=" if stage.is_lower_bound else "<="), ("" if stage.passed else "  OFF")
            digits = 9 if stage.name == "compared" else 3
            limit = "" if stage.limit is None else f" {sign}{stage.limit:>8g}"
            lines.append(f"{stage.name:<18}{stage.measure:<34}{stage.worst:>10.{digits}g}{limit}{verdict}")
        for flag, count in self.inexact.items():
            if count:
                lines.append(f"warning: {flag} was false in {count} batches; the graph's shortcut was not exact there")
        return "\n".join(lines)

"""Latency of plans on an engine: measured layers plus a measured rest, corrected by the plan that comes out."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.compression.channel_groups import is_detector
from norton_deploy.compression.compress import compress
from norton_deploy.compression.lowering import lower_model
from norton_deploy.cost.complexity import Complexity, LayerCall, count_complexity, layer_calls
from norton_deploy.cost.turns import Turns, time_in_turns
from norton_deploy.export.onnx_export import export_onnx, read_contract
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.export.static_roi_align import fix_sampling
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.openvino_backend import OpenVinoPredictor
from norton_deploy.inference.predictor import Image, Predictor
from norton_deploy.inference.static_graph import StaticGraphPredictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.parity.checked_quantisation import Quantisation
from norton_deploy.parity.export_checked import ExportOptions
from norton_deploy.search.decisions import Decision, Option, to_plan
from norton_deploy.search.form_tuning import TimingTable, tune_blocks
from norton_deploy.search.joint_cost import Budget, JointCost, calibrate, joint_cost
from norton_deploy.search.planner import Harm, Planner, Point
from norton_deploy.structures import Categories
from norton_deploy.training.rounding import FLOAT_LAYERS

TOLERANCE = 0.05
"""Relative difference between prediction and measurement above which the plan is made once more."""
MOST_PLANS = 3


@dataclass(frozen=True)
class Workload:
    """What every model gets alike: image size, regions through the heads per image, images per call."""

    image_size: tuple[int, int]
    proposals: int
    detections: int
    batch: int = 1

    @classmethod
    def of(cls, model: Any, image_size: tuple[int, int]) -> "Workload":
        """A detector's own numbers of proposals and detections; none for a classifier."""
        if not is_detector(model):
            return cls(image_size, 0, 0)
        return cls(image_size, int(model.rpn._post_nms_top_n["testing"]), int(model.roi_heads.detections_per_img))

    def calls(self, model: nn.Module) -> list[LayerCall]:
        """Every call of a layer of the model for one image."""
        calls = layer_calls(model, self.image_size, proposals=self.proposals, detections=self.detections)
        return [replace(call, shape=replace(call.shape, in_float=call.name.startswith(FLOAT_LAYERS))) for call in calls]

    def complexity(self, model: nn.Module) -> Complexity:
        """MACs of the model for one image, and its parameters."""
        return count_complexity(model, self.image_size, proposals=self.proposals, detections=self.detections)


def tuned_predictor(
    model: nn.Module, workload: Workload, categories: Categories, table: TimingTable, images: Sequence[Image]
) -> StaticGraphPredictor:
    """A detector in evaluation mode, exported with every CPDBlock in its fastest form and opened; 8 bits have the
    ranges of these few images, which is enough for a time."""
    engine, _, precision = table.engine.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_tuned(model, workload, categories, table, file)
        if precision == "int8":
            Quantisation.of(file, read_contract(file), images, ExportOptions(), lambda _: None).write(file)
        if engine == "openvino":
            return OpenVinoPredictor(file, float_type="bf16" if precision == "bf16" else "fp32")
        return OnnxRuntimePredictor(file, device="cuda" if precision == "cuda" else "cpu")


def export_tuned(
    model: nn.Module, workload: Workload, categories: Categories, table: TimingTable, file: Path
) -> dict[str, str]:
    """Export a detector with every CPDBlock in its fastest form; returns block -> form."""
    forms = {tuning.name: tuning.form for tuning in tune_blocks(workload.calls(model), table)}
    assert isinstance(model, GeneralizedRCNN)
    lowered = lower_model(fix_sampling(model), "grouped", forms)
    export_onnx(
        StaticRCNN(lowered, GraphSettings(workload.image_size, batch=workload.batch)), file, categories=categories
    )
    return dict(forms)


@dataclass(frozen=True)
class LatencyResult:
    """A plan with its predicted and measured latency.

    Attributes:
        point, plan: the plan; `point.cost` is its predicted latency.
        cost: latency of plans, calibrated.
        dense_ms: the dense model's median when the cost was calibrated.
        turns: the calls in turn that the plan was measured by, "dense" and "plan".
    """

    point: Point
    plan: CompressionPlan
    cost: JointCost
    dense_ms: float
    turns: Turns

    @property
    def speedups(self) -> npt.NDArray[np.float64]:
        """Paired ratios dense / plan of calls in the same turn, [rounds]."""
        return self.turns.of("dense") / self.turns.of("plan")

    @property
    def measured_ms(self) -> float:
        """`dense_ms` over the median paired ratio.

        So that a machine that has become busier or quieter since the calibration does not count.
        """
        return self.dense_ms / float(np.median(self.speedups))


class LatencySearch:
    """Finds plans for a latency on one engine.

    Attributes:
        cost: latency of plans, calibrated by `start`.
        dense_ms: the dense model's measured end-to-end time.
    """

    def __init__(
        self,
        dense: nn.Module,
        decisions: list[Decision],
        harm: Harm,
        workload: Workload,
        categories: Categories,
        images: Sequence[Image],
        table: TimingTable,
        *,
        rounds: int,
        seed: int,
        report: Callable[[str], None],
    ) -> None:
        """
        Args:
            dense: detector in evaluation mode.
            decisions: about it.
            harm: of each option.
            workload: image size; proposals and detections are the detector's own.
            categories: of the detector.
            images: uint8 RGB [H, W, 3] for end-to-end calls.
            table: times of the layers' forms; also says which engine runs the graphs.
            rounds: measured end-to-end calls of each model.
            seed: of the decompositions.
            report: gets a line for each step.
        """
        self.dense, self.decisions, self.harm, self.workload = dense, decisions, harm, workload
        self.categories, self.images, self.table = categories, images, table
        self.rounds, self.seed, self.report = rounds, seed, report
        self.cost: JointCost = joint_cost(
            dense, workload.calls(dense), "latency_ms", lambda shape: table.fastest(shape)[1]
        )
        self.dense_ms = 0.0
        self._dense_predictor = tuned_predictor(dense, workload, categories, table, images)
        self._measured: list[tuple[CompressionPlan, float]] = []

    def start(self) -> None:
        """Time the dense model and two uniform plans end to end, and calibrate the cost by all three."""
        decomposed = {d.group: Option(d.forms[len(d.forms) // 2], d.widths[0]) for d in self.decisions}
        narrowed = {d.group: Option(d.forms[-1], d.widths[len(d.widths) // 2]) for d in self.decisions}
        plans = [to_plan(choice, self.decisions, "rcnn") for choice in (decomposed, narrowed)]
        self.report("timing the dense model and two uniform plans end to end")
        turns = self._measure({"decomposed": plans[0], "narrowed": plans[1]})
        self.dense_ms = turns.summary("dense").p50_ms
        self._measured = [(CompressionPlan("rcnn"), self.dense_ms)]
        for plan, name in zip(plans, ("decomposed", "narrowed"), strict=True):
            self._measured.append((plan, self.dense_ms * float(np.median(turns.of(name) / turns.of("dense")))))
        self.report("timing layers in their forms")
        calibrate(self.cost, self._measured)
        self.table.save()

    def find(self, budget: Budget) -> LatencyResult:
        """The plan for a latency, or for a speed-up over the dense model, measured and corrected: of at most
        `MOST_PLANS` the one whose measured latency is nearest to what was asked for."""
        limit_ms = budget.amount if budget.kind == "latency_ms" else self.dense_ms / budget.amount
        found: list[LatencyResult] = []
        for attempt in range(1, MOST_PLANS + 1):
            point = Planner(self.decisions, self.cost, self.harm).within(limit_ms)
            self.table.save()
            plan = to_plan(point.choice, self.decisions, "rcnn")
            result = LatencyResult(point, plan, self.cost, self.dense_ms, self._measure({"plan": plan}))
            found.append(result)
            self.report(f"plan {attempt}: predicted {point.cost:.1f} ms, measured {result.measured_ms:.1f} ms")
            if abs(result.measured_ms / point.cost - 1) <= TOLERANCE:
                break
            self._measured.append((plan, result.measured_ms))
            calibrate(self.cost, self._measured, near=attempt)
        return min(found, key=lambda result: abs(math.log(result.measured_ms / limit_ms)))

    def _measure(self, plans: dict[str, CompressionPlan]) -> Turns:
        """The dense model and plans in turn, from pixels to detections."""
        predictors = {"dense": self._dense_predictor}
        for name, plan in plans.items():
            small = compress(self.dense, plan, seed=self.seed, starts=1)
            predictors[name] = tuned_predictor(small, self.workload, self.categories, self.table, self.images)

        def call_of(predictor: Predictor) -> Callable[[int], object]:
            return lambda step: predictor([self.images[step % len(self.images)]])

        calls = {name: call_of(predictor) for name, predictor in predictors.items()}
        return time_in_turns(calls, rounds=self.rounds, warm_up=1)

"""Latency of plans: measured layers plus a measured rest, corrected by the plan that comes out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from norton_deploy.export.layer_calls import layer_calls
from norton_deploy.export.tuning import TimingTable
from norton_deploy.modeling.compress import compress
from norton_deploy.planning.plan import CompressionPlan
from norton_deploy.runtime.predictor import Image
from norton_deploy.search.decisions import Decision, Option, to_plan
from norton_deploy.search.end_to_end import Workload, measure_end_to_end
from norton_deploy.search.joint_cost import JointCost, calibrate, joint_cost
from norton_deploy.search.planner import Harm, Planner, Point
from norton_deploy.structures import Categories

TOLERANCE = 0.05
"""Relative difference between prediction and measurement above which the plan is made once more."""
MOST_PLANS = 3


@dataclass(frozen=True)
class LatencyResult:
    """A plan with its predicted and measured latency.

    Attributes:
        point, plan: the plan.
        predicted_ms: by the calibrated cost.
        measured_ms: `dense_ms` times the median ratio of plan to dense over calls in turn, so that a machine that
            has become busier or quieter since the calibration does not count.
        dense_ms: the dense model's median when the cost was calibrated.
    """

    point: Point
    plan: CompressionPlan
    predicted_ms: float
    measured_ms: float
    dense_ms: float


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
        self.dense, self.decisions, self.harm, self.workload = dense, decisions, harm, workload
        self.categories, self.images, self.table = categories, images, table
        self.rounds, self.seed, self.report = rounds, seed, report
        calls = layer_calls(dense, workload.image_size, proposals=workload.proposals, detections=workload.detections)
        self.cost: JointCost = joint_cost(dense, calls, "latency_ms", lambda shape: table.fastest(shape)[1])
        self.dense_ms = 0.0
        self._measured: list[tuple[CompressionPlan, float]] = []

    def start(self) -> None:
        """Time the dense model and two uniform plans end to end, and calibrate the cost by all three."""
        decomposed = {d.group: Option(d.ranks[min(1, len(d.ranks) - 1)], d.widths[0]) for d in self.decisions}
        narrowed = {d.group: Option(decomposed[d.group].rank, d.widths[len(d.widths) // 2]) for d in self.decisions}
        plans = [to_plan(choice, self.decisions, "rcnn") for choice in (decomposed, narrowed)]
        self.report("timing the dense model and two uniform plans end to end")
        dense_ms, ratios = self._measure(plans)
        self.dense_ms = dense_ms
        self._measured = [(CompressionPlan("rcnn"), dense_ms)]
        self._measured += [(plan, dense_ms * ratio) for plan, ratio in zip(plans, ratios, strict=True)]
        calibrate(self.cost, self._measured)
        self.table.save()

    def find(self, latency_ms: float | None, speedup: float | None) -> LatencyResult:
        """The plan for a latency in ms, or for a speed-up over the dense model, measured and corrected."""
        budget = latency_ms if speedup is None else self.dense_ms / speedup
        assert budget is not None
        for attempt in range(MOST_PLANS):
            point = Planner(self.decisions, self.cost, self.harm).within(budget)
            self.table.save()
            plan = to_plan(point.choice, self.decisions, "rcnn")
            _, [ratio] = self._measure([plan])
            measured_ms = self.dense_ms * ratio
            self.report(f"plan {attempt + 1}: predicted {point.cost:.1f} ms, measured {measured_ms:.1f} ms")
            result = LatencyResult(point, plan, point.cost, measured_ms, self.dense_ms)
            if abs(measured_ms / point.cost - 1) <= TOLERANCE:
                break
            self._measured.append((plan, measured_ms))
            calibrate(self.cost, self._measured)
        return result

    def _measure(self, plans: Sequence[CompressionPlan]) -> tuple[float, list[float]]:
        """Median time of the dense model, and the median ratio plan / dense of calls in the same turn."""
        models = {str(index): compress(self.dense, plan, seed=self.seed, starts=1) for index, plan in enumerate(plans)}
        times = measure_end_to_end(
            {"dense": self.dense, **models}, self.workload, self.categories, self.images, self.table, rounds=self.rounds
        )
        return float(np.median(times["dense"])), [float(np.median(times[name] / times["dense"])) for name in models]

"""Latency of plans: measured layers plus a measured rest, corrected by the plan that comes out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """A plan with its predicted and measured latency, and the dense model's measured in the same turns."""

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

    def start(self) -> None:
        """Time the dense model and a uniform plan end to end, and calibrate the cost by both."""
        uniform = to_plan(
            {d.group: Option(d.ranks[min(1, len(d.ranks) - 1)], d.widths[len(d.widths) // 2]) for d in self.decisions},
            self.decisions,
            "rcnn",
        )
        self.report("timing the dense model and a uniform plan end to end")
        times = self._measure(uniform)
        self.dense_ms = times["dense"]
        calibrate(self.cost, [(CompressionPlan("rcnn"), times["dense"]), (uniform, times["plan"])])
        self.table.save()

    def find(self, latency_ms: float | None, speedup: float | None) -> LatencyResult:
        """The plan for a latency in ms, or for a speed-up over the dense model, measured and corrected."""
        for attempt in range(MOST_PLANS):
            budget = latency_ms if speedup is None else self.dense_ms / speedup
            assert budget is not None
            point = Planner(self.decisions, self.cost, self.harm).within(budget)
            self.table.save()
            plan = to_plan(point.choice, self.decisions, "rcnn")
            times = self._measure(plan)
            result = LatencyResult(point, plan, point.cost, times["plan"], times["dense"])
            self.dense_ms = times["dense"]
            self.report(f"plan {attempt + 1}: predicted {point.cost:.1f} ms, measured {times['plan']:.1f} ms")
            if abs(times["plan"] / point.cost - 1) <= TOLERANCE:
                break
            calibrate(self.cost, [(CompressionPlan("rcnn"), times["dense"]), (plan, times["plan"])])
        return result

    def _measure(self, plan: CompressionPlan) -> dict[str, float]:
        models = {"dense": self.dense, "plan": compress(self.dense, plan, seed=self.seed, starts=1)}
        return measure_end_to_end(models, self.workload, self.categories, self.images, self.table, rounds=self.rounds)

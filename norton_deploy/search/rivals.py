"""A uniform plan beside the planner's: harm at equal cost."""

import math
from dataclasses import dataclass

from norton_deploy.method.plan import CompressionPlan
from norton_deploy.search.decisions import to_plan, untouched
from norton_deploy.search.planner import Planner
from norton_deploy.search.sensitivity import Sensitivity


@dataclass(frozen=True)
class Rival:
    """A uniform plan, and what the planner makes of the same cost.

    Attributes:
        label: the uniform plan's name.
        cost, harm: its predicted cost and measured harm.
        planned_cost, planned_predicted_harm, planned_harm: of the planner's plan within that cost, its harm
            predicted and measured; None where no plan considered is that cheap.
    """

    label: str
    cost: float
    harm: float
    planned_cost: float | None = None
    planned_predicted_harm: float | None = None
    planned_harm: float | None = None


def compare_uniform(label: str, plan: CompressionPlan, planner: Planner, sensitivity: Sensitivity) -> Rival:
    """Measure the harm of a fitted uniform plan and of the planner's plan at the same predicted cost."""
    cost, harm = planner.cost.of_plan(plan), sensitivity.of_plan(plan)
    if planner.solve(math.inf, untouched(planner.decisions)).cost > cost:
        return Rival(label, cost, harm)
    point = planner.within(cost)
    planned = to_plan(point.choice, planner.decisions, plan.architecture)
    return Rival(label, cost, harm, point.cost, point.harm, sensitivity.of_plan(planned))

"""The least harmful plan within a budget: a Lagrangian over all groups, with the cost of the joint plan.

Minimise harm(x) + lambda * cost(x) over the joint choice x, and find the smallest lambda whose solution keeps the
budget. Harm is a sum over groups, but cost is not: a layer costs about the product of the widths on its two sides.
For one lambda, groups are therefore optimised in turn, each exactly given all others; the objective falls with
every change, so this ends. What the budget then leaves over is spent on single changes, the most useful first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from norton_deploy.errors import UserError
from norton_deploy.search.decisions import Choice, Decision, Option, untouched
from norton_deploy.search.joint_cost import PYRAMID, JointCost

SWEEPS = 30
BISECTIONS = 40

Harm = Callable[[str, int, int], float]
"""(group, rank, keep) -> predicted harm of that option."""


@dataclass(frozen=True)
class Point:
    """A joint choice with its predicted cost and harm."""

    choice: dict[str, Option]
    cost: float
    harm: float


class Planner:
    """Searches joint choices for one model and one kind of cost."""

    def __init__(self, decisions: Sequence[Decision], cost: JointCost, harm: Harm) -> None:
        self.decisions, self.cost, self.harm = list(decisions), cost, harm
        self._touching = {decision.group: cost.touching(decision.group) for decision in decisions}

    def point(self, choice: Choice) -> Point:
        """Predicted cost and harm of a choice."""
        ranks, keep = self._as_plan(choice)
        harm = sum(self.harm(group, option.rank, option.keep) for group, option in choice.items())
        return Point(dict(choice), self.cost.of(ranks, keep), harm)

    def within(self, budget: float) -> Point:
        """The least harmful choice found that costs at most `budget`.

        Raises:
            UserError: not even the smallest options keep the budget.
        """
        dense = self.point(untouched(self.decisions))
        if dense.cost <= budget:
            return dense
        cheapest = self.solve(math.inf, dense.choice)
        if cheapest.cost > budget:
            raise UserError(
                f"budget {budget:.4g}: the smallest plan considered costs {cheapest.cost:.4g} (dense: "
                f"{dense.cost:.4g}); allow more, or consider smaller widths"
            )
        best, low, high = cheapest, 0.0, max(cheapest.harm, 1e-12) / dense.cost * 1e-3
        while (point := self.solve(high, dense.choice)).cost > budget:
            low, high = high, high * 4
            if not math.isfinite(high):
                break
        for _ in range(BISECTIONS):
            if point.cost <= budget and point.harm < best.harm:
                best = point
            middle = math.sqrt(low * high) if low > 0 else high / 2
            point = self.solve(middle, dense.choice)
            low, high = (middle, high) if point.cost > budget else (low, middle)
        if point.cost <= budget and point.harm < best.harm:
            best = point
        return self._spend_rest(best, budget)

    def frontier(self, points: int = 32) -> list[Point]:
        """Choices from dense to the smallest, none of them beaten in both cost and harm; by rising cost."""
        dense = self.point(untouched(self.decisions))
        smallest = self.solve(math.inf, dense.choice)
        scale = max(smallest.harm, 1e-12) / dense.cost
        weights = [scale * 10 ** (6 * step / points - 3) for step in range(points + 1)]
        found = [dense, smallest, *(self.solve(weight, dense.choice) for weight in weights)]
        front: list[Point] = []
        for point in sorted(found, key=lambda item: (item.cost, item.harm)):
            if not front or point.harm < front[-1].harm:
                front.append(point)
        return front

    def solve(self, weight: float, start: Choice) -> Point:
        """Minimise harm + weight * cost by optimising one group after the other; inf: cost alone."""
        choice = dict(start)
        ranks, keep = self._as_plan(choice)
        for _ in range(SWEEPS):
            changed = False
            for decision in self.decisions:
                present = choice[decision.group]
                scores = {option: self._score(weight, ranks, keep, decision, option) for option in decision.options}
                best = min(scores, key=scores.__getitem__)
                if scores[best] < scores[present] - 1e-12 * abs(scores[present]):
                    choice[decision.group], changed = best, True
                self._set(ranks, keep, decision, choice[decision.group])
            if not changed:
                break
        return self.point(choice)

    def _score(
        self, weight: float, ranks: dict[str, int], keep: dict[str, int], decision: Decision, option: Option
    ) -> float:
        """Harm + weight * cost of what depends on this group; leaves the option in `ranks` and `keep`."""
        self._set(ranks, keep, decision, option)
        cost = sum(self.cost.layer(layer, ranks, keep) for layer in self._touching[decision.group])
        if decision.group == PYRAMID:
            cost += self.cost.per_pyramid_channel * option.keep
        if math.isinf(weight):
            return cost
        return self.harm(decision.group, option.rank, option.keep) + weight * cost

    @staticmethod
    def _set(ranks: dict[str, int], keep: dict[str, int], decision: Decision, option: Option) -> None:
        keep[decision.group] = option.keep
        for layer in decision.decomposed:
            ranks[layer] = option.rank

    def _as_plan(self, choice: Choice) -> tuple[dict[str, int], dict[str, int]]:
        ranks: dict[str, int] = {}
        keep: dict[str, int] = {}
        for decision in self.decisions:
            self._set(ranks, keep, decision, choice[decision.group])
        return ranks, keep

    def _spend_rest(self, point: Point, budget: float) -> Point:
        """Single changes that lower the harm and still keep the budget, the largest gain first."""
        while True:
            better = [
                candidate
                for decision in self.decisions
                for option in decision.options
                if self.harm(decision.group, option.rank, option.keep)
                < self.harm(decision.group, point.choice[decision.group].rank, point.choice[decision.group].keep)
                and (candidate := self.point({**point.choice, decision.group: option})).cost <= budget
            ]
            if not better:
                return point
            point = min(better, key=lambda candidate: candidate.harm)

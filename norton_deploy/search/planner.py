"""The least harmful plan within a budget: a Lagrangian over all groups, with the cost of the joint plan.

A decision gives each channel group a decomposition and a number of kept filters. Minimise harm(x) + lambda * cost(x)
over the joint choice x, and find the smallest lambda whose solution keeps the budget. Harm is a sum over groups, but
cost is not: a layer costs about the product of the widths on its two sides. For one lambda, groups are therefore
optimised in turn, each exactly given all others; the objective falls with every change, so this ends. The solutions
next to the budget, below and above it, are then brought close to it by single changes: what is left over is spent on
the most useful ones, what is missing is saved by the least harmful.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from norton_deploy.compression.channel_groups import PYRAMID_GROUP
from norton_deploy.errors import UserError
from norton_deploy.method.plan import Decomposition
from norton_deploy.search.decisions import Choice, Decision, Option, forms_and_keep, untouched
from norton_deploy.search.joint_cost import JointCost

SWEEPS = 30
BISECTIONS = 40
ROUNDING = 1e-9

Harm = Callable[[str, Decomposition, int], float]
"""(group, form, keep) -> predicted harm of that option."""


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
        forms, keep = forms_and_keep(choice, self.decisions)
        harm = sum(self.harm(group, option.form, option.keep) for group, option in choice.items())
        return Point(dict(choice), self.cost.of(forms, keep), harm)

    def smallest(self, budget: float) -> Point:
        """The cheapest choice, which is to cost at most `budget`.

        Raises:
            UserError: not even it does.
        """
        dense = self.point(untouched(self.decisions))
        cheapest = self.solve(math.inf, dense.choice)
        if cheapest.cost > budget:
            raise UserError(
                f"a plan that costs {dense.cost / budget:.4g} times less than the dense model was asked for, the "
                f"smallest one considered costs {dense.cost / cheapest.cost:.3g} times less; ask for no more "
                "(--budget, --speedup)"
            )
        return cheapest

    def within(self, budget: float) -> Point:
        """The least harmful choice found that costs at most `budget`.

        Raises:
            UserError: not even the smallest options keep the budget.
        """
        dense = self.point(untouched(self.decisions))
        if dense.cost <= budget:
            return dense
        cheapest = self.smallest(budget)
        front = self.frontier()
        low, high = 0.0, max(cheapest.harm, 1e-12) / dense.cost * 1e-3
        while (point := self.solve(high, dense.choice)).cost > budget and math.isfinite(high * 4):
            low, high = high, high * 4
        for _ in range(BISECTIONS):
            front.append(point)
            middle = math.sqrt(low * high) if low > 0 else high / 2
            point = self.solve(middle, dense.choice)
            low, high = (middle, high) if point.cost > budget else (low, middle)
        best = min((found for found in front if found.cost <= budget), key=lambda found: found.harm)
        above = min((found for found in front if found.cost > budget), key=lambda found: found.cost)
        # No weight's solution may lie close below the budget, so the one close above it is tried too.
        kept = [best, *filter(None, [self._cut(above, budget)])]
        return min((self._spend_rest(found, budget) for found in kept), key=lambda found: found.harm)

    def frontier(self, points: int = 32) -> list[Point]:
        """Choices from dense to the smallest, none of them beaten in both cost and harm; by rising cost."""
        dense = self.point(untouched(self.decisions))
        smallest = self.solve(math.inf, dense.choice)
        scale = max(smallest.harm, 1e-12) / dense.cost
        weights = [scale * 10 ** (6 * step / points - 3) for step in range(points + 1)]
        found = [dense, smallest]
        for weight in weights:
            found += [self.solve(weight, start.choice) for start in (dense, smallest)]
        front: list[Point] = []
        for point in sorted(found, key=lambda item: (item.cost, item.harm)):
            if not front or point.harm < front[-1].harm:
                front.append(point)
        return front

    def solve(self, weight: float, start: Choice) -> Point:
        """Minimise harm + weight * cost by optimising one group after the other; inf: cost alone."""
        choice = dict(start)
        forms, keep = forms_and_keep(choice, self.decisions)
        for _ in range(SWEEPS):
            changed = False
            for decision in self.decisions:
                present = choice[decision.group]
                scores = {option: self._score(weight, forms, keep, decision, option) for option in decision.options}
                best = min(scores, key=scores.__getitem__)
                if scores[best] < scores[present] - 1e-12 * abs(scores[present]):
                    choice[decision.group], changed = best, True
                self._set(forms, keep, decision, choice[decision.group])
            if not changed:
                break
        return self.point(choice)

    def _score(
        self, weight: float, forms: dict[str, Decomposition], keep: dict[str, int], decision: Decision, option: Option
    ) -> float:
        """Harm + weight * cost of what depends on this group; leaves the option in `forms` and `keep`."""
        self._set(forms, keep, decision, option)
        cost = self._local_cost(forms, keep, decision)
        if math.isinf(weight):
            return cost
        return self.harm(decision.group, option.form, option.keep) + weight * cost

    def _local_cost(self, forms: dict[str, Decomposition], keep: dict[str, int], decision: Decision) -> float:
        """Cost of what depends on a group."""
        cost = sum(self.cost.layer(layer, forms, keep) for layer in self._touching[decision.group])
        return cost + (self.cost.per_pyramid_channel * keep[PYRAMID_GROUP] if decision.group == PYRAMID_GROUP else 0.0)

    @staticmethod
    def _set(forms: dict[str, Decomposition], keep: dict[str, int], decision: Decision, option: Option) -> None:
        keep[decision.group] = option.keep
        for layer in decision.decomposed:
            forms[layer] = option.form

    def _cut(self, point: Point, budget: float) -> Point | None:
        """Single changes that add the least harm for what they save, until the budget is kept; None: it cannot be."""
        while point.cost > budget:
            cheaper = [candidate for candidate in self._neighbours(point) if candidate.cost < point.cost]
            if not cheaper:
                return None
            present = point

            def price(candidate: Point, present: Point = present) -> float:
                # What a change saves beyond the budget is worth nothing.
                return (candidate.harm - present.harm) / (present.cost - max(candidate.cost, budget))

            point = min(cheaper, key=price)
        return self.point(point.choice)

    def _neighbours(self, point: Point) -> Iterator[Point]:
        """All choices that differ in one group."""
        forms, keep = forms_and_keep(point.choice, self.decisions)
        for decision in self.decisions:
            group, present = decision.group, point.choice[decision.group]
            cost = point.cost - self._local_cost(forms, keep, decision)
            harm = point.harm - self.harm(group, present.form, present.keep)
            for option in decision.options:
                if option != present:
                    self._set(forms, keep, decision, option)
                    yield Point(
                        {**point.choice, group: option},
                        cost + self._local_cost(forms, keep, decision),
                        harm + self.harm(group, option.form, option.keep),
                    )
            self._set(forms, keep, decision, present)

    def _spend_rest(self, point: Point, budget: float) -> Point:
        """Single changes that lower the harm and still keep the budget, the largest gain first."""
        while True:
            better = [
                candidate
                for candidate in self._neighbours(point)
                if candidate.harm < (1 - ROUNDING) * point.harm and candidate.cost <= budget
            ]
            if not better:
                return self.point(point.choice)
            point = min(better, key=lambda candidate: candidate.harm)

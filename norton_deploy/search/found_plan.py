"""A found plan with all that is known about it: cost, latency, harm, every layer, and where uniform plans stand."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from norton_deploy.compression.lowering import Form
from norton_deploy.cost.complexity import Complexity
from norton_deploy.method.plan import DENSE, CompressionPlan, Decomposition
from norton_deploy.search.decisions import STEMS, Choice, Decision, forms_and_keep
from norton_deploy.search.form_tuning import BlockTuning
from norton_deploy.search.joint_cost import UNITS, Budget, JointCost
from norton_deploy.search.latency_budget import LatencyResult, Workload
from norton_deploy.search.planner import Harm, Point


@dataclass(frozen=True)
class LayerChoice:
    """One convolution with a kernel above 1 x 1 under a plan.

    Attributes:
        name: the layer.
        decomposition: how it is decomposed, "dense" when it is not.
        keep, width: its kept filters, and the dense model's.
        form: measured fastest form of a layer with CP factors; None for others, or when nothing was timed.
        form_ms: time of the layer in its form, all calls in one image added up; None when nothing was timed.
        original_ms: time of the dense model's layer.
        dense_because: why it runs dense; None when it does not.
    """

    name: str
    decomposition: str
    keep: int
    width: int
    form: Form | None = None
    form_ms: float | None = None
    original_ms: float | None = None
    dense_because: str | None = None


@dataclass(frozen=True, kw_only=True)
class FoundPlan:
    """A plan and all that is known about it.

    Attributes:
        plan: the plan.
        budget: that it was searched for.
        point: its joint choice with the predicted cost and harm.
        dense_cost: cost of the dense model.
        workload: image size, proposals and detections that every figure is for.
        dense, small: MACs and parameters of the dense and the planned model.
        latency: measured end to end; None for budgets of MACs or parameters.
        measured_harm: of the plan as a whole, compressed and refitted; None if it was not measured.
        images, fit_images: number of images on which harm was measured, and of those that choices were fitted to.
        short_side: of both in pixels.
        choices: number of single choices whose harm was measured.
        layers: the choice for every convolution that could be decomposed.
        front: undominated choices, by rising cost.
        uniform: each uniform plan's label, cost ratio and measured harm, and the planner's plan at its cost or None.
        by_layer: whether the predicted harm is that of layers, which is no prediction of the measured one.
        seconds: time that each part of the search took.
    """

    plan: CompressionPlan
    budget: Budget
    point: Point
    dense_cost: float
    workload: Workload
    dense: Complexity
    small: Complexity
    latency: LatencyResult | None
    measured_harm: float | None
    images: int
    fit_images: int
    short_side: int
    choices: int
    layers: list[LayerChoice]
    front: list[Point]
    uniform: list[dict[str, Any]]
    by_layer: bool
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON form.

        `prediction_error` is predicted over measured milliseconds minus 1; for budgets of MACs and parameters it is
        predicted over counted, minus 1. Spreads are 10th to 90th percentile of the paired calls.
        """
        own = {
            "label": "this plan",
            "ratio": self.dense_cost / self.point.cost,
            "predicted_harm": self.point.harm,
            "measured_harm": self.measured_harm,
        }
        return {
            "budget": str(self.budget),
            "image_size": list(self.workload.image_size),
            "proposals": self.workload.proposals,
            "detections": self.workload.detections,
            "dense_macs": self.dense.macs,
            "macs": self.small.macs,
            "dense_params": self.dense.params,
            "params": self.small.params,
            **self._cost(),
            "predicted_harm": self.point.harm,
            "measured_harm": self.measured_harm,
            "choose": self.plan.choose,
            "sensitivity": {
                "images": self.images,
                "fit_images": self.fit_images,
                "short_side": self.short_side,
                "choices": self.choices,
                "by_layer": self.by_layer,
            },
            "layers": [asdict(layer) for layer in self.layers],
            "stays_dense": {
                layer.name: layer.dense_because for layer in self.layers if layer.dense_because is not None
            },
            "frontier": [{"ratio": self.dense_cost / point.cost, "predicted_harm": point.harm} for point in self.front],
            "marks": [own, *self.uniform],
            "seconds": {name: round(time, 1) for name, time in self.seconds.items()},
        }

    def _cost(self) -> dict[str, Any]:
        latency = self.latency
        if latency is None:
            counted = self.small.macs if self.budget.kind == "macs" else self.small.params
            return {"prediction_error": self.point.cost / counted - 1}
        p10, p90 = (float(value) for value in np.percentile(latency.speedups, [10, 90]))
        return {
            "dense_measured_ms": latency.dense_ms,
            "predicted_ms": latency.point.cost,
            "measured_ms": latency.measured_ms,
            "measured_ms_p10_p90": [latency.dense_ms / p90, latency.dense_ms / p10],
            "same_turns_median_ms": {name: latency.turns.summary(name).p50_ms for name in latency.turns.names},
            "rounds": len(latency.speedups),
            "predicted_speedup": latency.dense_ms / latency.point.cost,
            "measured_speedup": latency.dense_ms / latency.measured_ms,
            "measured_speedup_p10_p90": [p10, p90],
            "prediction_error": latency.point.cost / latency.measured_ms - 1,
        }


def layer_choices(
    dense: nn.Module,
    decisions: Sequence[Decision],
    choice: Choice,
    cost: JointCost,
    harm: Harm,
    unit: str,
    tunings: Sequence[BlockTuning] = (),
) -> list[LayerChoice]:
    """The choice for every convolution that could be decomposed, and for the stem, in the model's order.

    Args:
        dense: the dense model.
        decisions: about it.
        choice: the plan's option of each group.
        cost: of joint plans.
        harm: of single options.
        unit: of the cost, for the reasons.
        tunings: measured forms of the plan's blocks; none for budgets of MACs or parameters.
    """
    timed = {tuning.name: tuning for tuning in tunings}
    calls = {layer.name: layer for layer in cost.layers}
    forms, keep = forms_and_keep(choice, decisions)
    found: dict[str, LayerChoice] = {}
    for decision in decisions:
        option, width = choice[decision.group], decision.widths[0]
        because = None if option.form.form else _why_dense(decision, decisions, choice, cost, harm, unit)
        for name in decision.decomposed:
            tuning = timed.get(name)
            layer = LayerChoice(name, str(option.form), option.keep, width, dense_because=because)
            if tuning is not None:
                slower = tuning.verdict.removeprefix(f"{name}: ") if tuning.form == "dense" else None
                layer = replace(
                    layer, form=tuning.form, form_ms=tuning.times_ms[tuning.form], original_ms=tuning.original_ms,
                    dense_because=slower,
                )  # fmt: skip
            elif unit == UNITS["latency_ms"] and option.form.form:
                now, before = cost.layer(calls[name], forms, keep), cost.layer(calls[name], {}, {})
                layer = replace(layer, form_ms=now / cost.scale, original_ms=before / cost.scale)
            found[name] = layer
        if decision.group in STEMS:
            stem = decision.group
            found[stem] = LayerChoice(stem, "dense", option.keep, width, dense_because="the stem is never decomposed")
    return [found[name] for name, _ in dense.named_modules() if name in found]


def _why_dense(
    decision: Decision, decisions: Sequence[Decision], choice: Choice, cost: JointCost, harm: Harm, unit: str
) -> str:
    """What decomposing a group would save at the plan's widths, and do."""
    if len(decision.forms) == 1:
        return "no decomposition is possible or considered"
    forms, keep = forms_and_keep(choice, decisions)
    layers = [layer for layer in cost.layers if layer.name in decision.decomposed]

    def of_form(form: Decomposition) -> float:
        return sum(cost.layer(layer, {**forms, layer.name: form}, keep) for layer in layers)

    form = min(decision.forms[1:], key=of_form)
    dense, best = of_form(DENSE), of_form(form)
    if dense - best <= 1e-3 * dense:
        return f"no decomposition would be cheaper: {dense:.3g} {unit} dense, at best {best:.3g} as {form}"
    added = harm(decision.group, form, decision.widths[0])
    return f"{form} would save {dense - best:.3g} {unit} and add a harm of {added:.2g}"

"""Cost of a whole plan: MACs, parameters or milliseconds, from the widths on both sides of every layer; its budget.

A layer's cost depends on two groups, the one whose channels it reads and the one it writes: roughly the product of
their widths. So the cost is always that of the joint plan; nothing is linearised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast, get_args

import numpy as np
from scipy.optimize import nnls
from torch import nn

from norton_deploy.compression.channel_groups import PYRAMID_GROUP, channel_groups
from norton_deploy.cost.complexity import LayerCall, LayerShape, layer_params
from norton_deploy.errors import UserError
from norton_deploy.method.plan import DENSE, CompressionPlan, Decomposition

Measure = Literal["macs", "params", "latency_ms"]
BudgetKind = Literal[Measure, "speedup"]
UNITS: dict[Measure, str] = {"macs": "MACs", "params": "parameters", "latency_ms": "ms"}
NEAR_WEIGHT = 10.0


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    Attributes:
        kind: macs or params (a share of the dense model's, 0..1), latency_ms, or speedup over the dense model.
        amount: the limit.
    """

    kind: BudgetKind
    amount: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """ "speedup=4" -> Budget("speedup", 4.0).

        Raises:
            UserError: not one of the four kinds, or an impossible number.
        """
        kind, _, number = text.partition("=")
        try:
            amount = float(number)
        except ValueError:
            amount = -1.0
        if kind not in get_args(BudgetKind) or amount <= 0:
            raise UserError(f"--budget {text}: expected macs=0.2, params=0.5, latency_ms=400 or speedup=4")
        if kind in ("macs", "params") and amount > 1:
            raise UserError(f"--budget {text}: a share of the dense model's, between 0 and 1")
        return cls(cast(BudgetKind, kind), amount)

    @property
    def measure(self) -> Measure:
        """What has to be counted or timed to keep it."""
        return "latency_ms" if self.kind == "speedup" else self.kind

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}"


@dataclass(frozen=True)
class _Layer:
    name: str
    shapes: tuple[LayerShape, ...]
    reads: str | None
    columns: int
    writes: str | None


@dataclass
class JointCost:
    """Sum over all layers of the cost of their shapes, plus what does not depend on any layer.

    Attributes:
        layers: every layer with weights, its calls and the groups on its two sides.
        shape_cost: cost of one call (of one layer for parameters).
        once: whether a layer counts once, however often it is called (parameters).
        scale: what the layers' cost counts inside a whole graph (their times, measured one by one).
        fixed: cost outside the layers: everything else that takes time, or normalisations' parameters.
        per_pyramid_channel: what the pyramid's width costs outside the layers (RoIAlign).
    """

    layers: tuple[_Layer, ...]
    shape_cost: Callable[[LayerShape], float]
    once: bool = False
    scale: float = 1.0
    fixed: float = 0.0
    per_pyramid_channel: float = 0.0
    pyramid_width: int = 0
    _known: dict[tuple[str, int, int, Decomposition], float] = field(default_factory=dict, repr=False)

    def of(self, forms: Mapping[str, Decomposition], keep: Mapping[str, int]) -> float:
        """Cost of a plan given by the forms of layers and the kept filters of groups (absent: untouched)."""
        total = self.fixed + self.per_pyramid_channel * keep.get(PYRAMID_GROUP, self.pyramid_width)
        return total + sum(self.layer(layer, forms, keep) for layer in self.layers)

    def of_plan(self, plan: CompressionPlan) -> float:
        """Cost of a plan that was fitted to the model (`fit_plan`)."""
        return self.of({layer.name: plan.decomposition(layer.name) for layer in self.layers}, plan.keep)

    def layer(self, layer: _Layer, forms: Mapping[str, Decomposition], keep: Mapping[str, int]) -> float:
        """Cost of one layer under a plan."""
        first = layer.shapes[0]
        inputs = first.in_channels if layer.reads is None else keep.get(layer.reads, 0) * layer.columns
        outputs = first.out_channels if layer.writes is None else keep.get(layer.writes, 0)
        inputs, outputs = inputs or first.in_channels, outputs or first.out_channels
        key = (layer.name, inputs, outputs, forms.get(layer.name, DENSE))
        if key not in self._known:
            calls = layer.shapes[:1] if self.once else layer.shapes
            shapes = (shape for call in calls for shape in decomposed_shapes(call, key[3], inputs, outputs))
            self._known[key] = sum(map(self.shape_cost, shapes))
        return self.scale * self._known[key]

    def touching(self, group: str) -> tuple[_Layer, ...]:
        """The layers whose cost depends on a group."""
        return tuple(layer for layer in self.layers if group in (layer.reads, layer.writes))


def decomposed_shapes(shape: LayerShape, form: Decomposition, inputs: int, outputs: int) -> list[LayerShape]:
    """What a convolution of other widths runs as in a form: a CPDBlock, or the ordinary convolutions of a chain
    (`FactoredConv`).

    Args:
        shape: of the dense layer.
        form: its decomposition; its ranks of channels are clipped to the widths.
        inputs, outputs: channels that are left.
    """
    numbers = form.clipped(inputs, outputs).numbers
    if form.form in ("", "ranks"):
        return [shape.resized(inputs, outputs, numbers[0] if numbers else 0)]
    point = replace(shape, kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    if form.form == "coupled":
        rank, clusters = numbers
        middle = replace(shape.resized(rank * clusters, outputs, 0), groups=clusters)
        return [point.resized(inputs, rank * clusters, 0), middle]
    first, last = numbers if form.form == "tucker" else numbers * 2
    middle = replace(shape.resized(first, last, 0), groups=1 if form.form == "tucker" else first)
    exit = replace(point.resized(last, outputs, 0), input_size=(shape.input_size[0], *shape.output_size))
    return [point.resized(inputs, first, 0), middle, exit]


def joint_cost(
    model: nn.Module, calls: list[LayerCall], measure: Measure, time_ms: Callable[[LayerShape], float] | None = None
) -> JointCost:
    """The cost of plans for a dense model.

    Args:
        model: dense.
        calls: its calls for one image (`layer_calls`).
        measure: what to count. For latency, `fixed` and `per_pyramid_channel` are left as they are (see `calibrate`).
        time_ms: time of a layer shape in its fastest form; needed for latency.
    """
    groups = channel_groups(model)
    writes = {producer: group.name for group in groups.values() for producer in group.producers}
    reads = {reader.layer: (group.name, reader.columns) for group in groups.values() for reader in group.readers}
    shapes: dict[str, list[LayerShape]] = {}
    for call in calls:
        shapes.setdefault(call.name, []).append(call.shape)
    layers = tuple(
        _Layer(
            name, tuple(found), reads[name][0] if name in reads else None, reads.get(name, ("", 1))[1], writes.get(name)
        )
        for name, found in shapes.items()
    )
    width = next((layer.shapes[0].out_channels for layer in layers if layer.writes == PYRAMID_GROUP), 0)
    if measure == "latency_ms":
        assert time_ms is not None
        return JointCost(layers, time_ms, pyramid_width=width)
    if measure == "macs":
        return JointCost(layers, lambda shape: float(shape.macs), pyramid_width=width)
    cost = JointCost(layers, lambda shape: float(shape.params), once=True, pyramid_width=width)
    # Biases and normalisations; their small fall with the widths is left out, so the budget is kept with room.
    cost.fixed = sum(layer_params(layer) for layer in model.modules()) - cost.of({}, {})
    return cost


def calibrate(cost: JointCost, measured_ms: list[tuple[CompressionPlan, float]], near: int = 0) -> None:
    """Fit the three terms of a latency to whole models that were timed end to end, in place.

    Latency = scale * (sum of the layers) + per_pyramid_channel * (pyramid's width) + fixed. Box selection, NMS and
    pixels take the same time for every plan; RoIAlign grows with the pyramid's width. Relative errors are
    minimised, no term below zero; the last `near` measurements, those close to what is wanted, count ten times: all of
    them alike, since one measurement alone may be off.
    """
    cost.scale, cost.fixed, cost.per_pyramid_channel = 1.0, 0.0, 0.0
    layers_ms = [cost.of_plan(plan) for plan, _ in measured_ms]
    widths = [plan.keep.get(PYRAMID_GROUP, cost.pyramid_width) for plan, _ in measured_ms]
    total_ms = np.array([ms for _, ms in measured_ms])
    weight = np.ones(len(total_ms))
    weight[len(weight) - near :] = NEAR_WEIGHT
    terms = np.stack([layers_ms, np.asarray(widths, float), np.ones(len(total_ms))], axis=1)
    solution, _ = nnls(terms / total_ms[:, None] * weight[:, None], weight)
    cost.scale, cost.per_pyramid_channel, cost.fixed = (float(term) for term in solution)

"""What a plan does to each convolution, in which form it runs, and why some stay dense."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from norton_deploy.compression.lowering import Form
from norton_deploy.cost.form_tuning import BlockTuning
from norton_deploy.search.decisions import STEMS, Choice, Decision
from norton_deploy.search.joint_cost import JointCost
from norton_deploy.search.planner import Harm


@dataclass(frozen=True)
class LayerChoice:
    """One convolution with a kernel above 1 x 1 under a plan.

    Attributes:
        name: the layer.
        rank: CP rank, 0 when it is not decomposed.
        keep, width: its kept filters, and the dense model's.
        form: measured fastest form of a decomposed layer; None when it is not decomposed or nothing was timed.
        form_ms: time of that form, all calls in one image added up.
        original_ms: time of the dense model's layer.
        dense_because: why it runs dense; None when it does not.
    """

    name: str
    rank: int
    keep: int
    width: int
    form: Form | None = None
    form_ms: float | None = None
    original_ms: float | None = None
    dense_because: str | None = None


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
    found: dict[str, LayerChoice] = {}
    for decision in decisions:
        option, width = choice[decision.group], decision.widths[0]
        because = None if option.rank else _why_dense(decision, decisions, choice, cost, harm, unit)
        for name in decision.decomposed:
            tuning = timed.get(name)
            if tuning is None:
                found[name] = LayerChoice(name, option.rank, option.keep, width, dense_because=because)
                continue
            slower = tuning.verdict.removeprefix(f"{name}: ") if tuning.form == "dense" else None
            found[name] = LayerChoice(
                name, option.rank, option.keep, width, tuning.form, tuning.times_ms[tuning.form], tuning.original_ms,
                slower,
            )  # fmt: skip
        if decision.group in STEMS:
            stem = decision.group
            found[stem] = LayerChoice(stem, 0, option.keep, width, dense_because="the stem is never decomposed")
    return [found[name] for name, _ in dense.named_modules() if name in found]


def _why_dense(
    decision: Decision, decisions: Sequence[Decision], choice: Choice, cost: JointCost, harm: Harm, unit: str
) -> str:
    """What decomposing a group would save at the plan's widths, and do."""
    keep = {group: option.keep for group, option in choice.items()}
    ranks = {layer: choice[other.group].rank for other in decisions for layer in other.decomposed}
    layers = [layer for layer in cost.layers if layer.name in decision.decomposed]

    def of_rank(rank: int) -> float:
        return sum(cost.layer(layer, {**ranks, layer.name: rank}, keep) for layer in layers)

    if len(decision.ranks) == 1:
        return "no rank is possible or considered"
    rank = min(decision.ranks[1:], key=of_rank)
    saved = of_rank(0) - of_rank(rank)
    if saved <= 1e-3 * of_rank(0):
        return f"no rank would be cheaper: {of_rank(0):.3g} {unit} dense, at best {of_rank(rank):.3g} at rank {rank}"
    added = harm(decision.group, rank, decision.widths[0])
    return f"rank {rank} would save {saved:.3g} {unit} and add a harm of {added:.2g}"

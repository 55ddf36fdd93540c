"""What a plan may do to each channel group of a model: decompose its convolutions, and keep some of its filters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from norton_deploy.compression.channel_groups import channel_groups, output_width
from norton_deploy.cost.complexity import LayerShape
from norton_deploy.method.cp import max_rank
from norton_deploy.method.plan import DENSE, FORMS, CompressionPlan, Decomposition
from norton_deploy.method.plan import Choice as FilterChoice
from norton_deploy.search.joint_cost import decomposed_shapes

RANKS = (1, 2)
FRACTIONS = (0.75, 0.5, 0.375, 0.25)
TUCKER_SHARES = (1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
LAYER_CP_SHARES = (1 / 2, 1 / 4)
COUPLINGS = ((8, 4), (16, 4), (4, 16), (8, 16))
"""Ranks and clusters."""
RANK_STEP = 8
"""Ranks of channels are multiples of this: engines compute in blocks of channels."""
WORTHWHILE = 0.8
"""A decomposition is considered if it has at most this share of the layer's MACs."""
STEMS = ("conv1", "backbone.body.conv1")


@dataclass(frozen=True)
class Option:
    """One choice for a group: how its convolutions are decomposed, and its number of kept filters."""

    form: Decomposition
    keep: int


@dataclass(frozen=True)
class Decision:
    """A channel group and its options; coupled layers (a residual stage, the pyramid's levels) are one group.

    Attributes:
        group: name of the channel group.
        decomposed: its producers that may be decomposed; 1x1 convolutions and linear layers never are.
        forms: decompositions to choose from, `DENSE` first.
        widths: numbers of filters to choose from, the whole width first.
        reads: for each of `decomposed`, the group whose channels it reads and their whole number.
    """

    group: str
    decomposed: tuple[str, ...]
    forms: tuple[Decomposition, ...]
    widths: tuple[int, ...]
    reads: tuple[tuple[str | None, int], ...] = ()

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """All combinations, the untouched group first; clusters stay equally large."""
        return tuple(
            Option(form, width)
            for form in self.forms
            for width in self.widths
            if form.form != "coupled" or width % form.numbers[1] == 0
        )


Choice = Mapping[str, Option]
"""Group name -> its option, for every decision."""


def list_decisions(
    model: nn.Module,
    *,
    forms: Sequence[str] = FORMS,
    ranks: tuple[int, ...] = RANKS,
    fractions: tuple[float, ...] = FRACTIONS,
    multiple: int = 16,
) -> list[Decision]:
    """All decisions about a dense model, with every candidate decomposition.

    Args:
        model: classifier or detector.
        forms: sections of a plan to consider.
        ranks: CP ranks of filters to consider; those above eq. 8 are left out. A network's stem is never decomposed.
        fractions: shares of a group's filters to consider keeping.
        multiple: kept numbers are rounded to multiples of this, because engines compute in blocks of channels.
    """
    decisions, groups = [], channel_groups(model)
    reads = {reader.layer: group.name for group in groups.values() for reader in group.readers}
    for name, group in groups.items():
        layers = {producer: model.get_submodule(producer) for producer in group.producers}
        width = output_width(next(iter(layers.values())))
        kept = (max(multiple, round(width * fraction / multiple) * multiple) for fraction in fractions)
        widths = (width, *sorted({count for count in kept if count < width}, reverse=True))
        convolutions = {
            producer: layer
            for producer, layer in layers.items()
            if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 and producer not in STEMS
        }
        possible = [candidates(conv, forms, ranks) for conv in convolutions.values()]
        common = tuple(form for form in possible[0] if all(form in other for other in possible)) if possible else ()
        sources = tuple((reads.get(producer), conv.in_channels) for producer, conv in convolutions.items())
        decisions.append(Decision(name, tuple(convolutions), (DENSE, *common), widths, sources))
    return decisions


def candidates(conv: nn.Conv2d, forms: Sequence[str] = FORMS, ranks: Sequence[int] = RANKS) -> list[Decomposition]:
    """Decompositions of a convolution with clearly fewer MACs than its own."""
    inputs, outputs, (kernel_h, kernel_w) = conv.in_channels, conv.out_channels, conv.kernel_size

    def stepped(share: float, channels: int) -> int:
        return max(RANK_STEP, round(share * channels / RANK_STEP) * RANK_STEP)

    limit = max_rank(inputs, kernel_h, kernel_w)
    pairs = ((stepped(share, inputs), stepped(share, outputs)) for share in TUCKER_SHARES)
    found: dict[str, list[tuple[int, ...]]] = {
        "ranks": [(rank,) for rank in sorted(ranks) if rank <= limit],
        "tucker": [pair for pair in pairs if pair[0] < inputs and pair[1] < outputs],
        "layer_cp": [(stepped(share, max(inputs, outputs)),) for share in LAYER_CP_SHARES],
        "coupled": [
            (rank, clusters)
            for rank, clusters in COUPLINGS
            if outputs % clusters == 0 and rank <= min(inputs, outputs // clusters * kernel_h * kernel_w)
        ],
    }
    dense = form_macs(conv, DENSE)
    listed = [Decomposition(form, numbers) for form in FORMS if form in forms for numbers in dict.fromkeys(found[form])]
    return [form for form in listed if form_macs(conv, form) <= WORTHWHILE * dense]


def form_macs(conv: nn.Conv2d, form: Decomposition) -> int:
    """MACs of a layer in a form on a map of 32 x 32 positions."""
    shape = LayerShape.of(conv, (1, conv.in_channels, 32, 32))
    return sum(part.macs for part in decomposed_shapes(shape, form, conv.in_channels, conv.out_channels))


def forms_and_keep(choice: Choice, decisions: Sequence[Decision]) -> tuple[dict[str, Decomposition], dict[str, int]]:
    """How every layer that could be decomposed is, and the kept filters of every group."""
    forms = {layer: choice[decision.group].form for decision in decisions for layer in decision.decomposed}
    return forms, {decision.group: choice[decision.group].keep for decision in decisions}


def to_plan(choice: Choice, decisions: Sequence[Decision], architecture: str, note: str = "") -> CompressionPlan:
    """The plan of a joint choice; what stays whole is not named, and no rank is above the kept channels. Its filters
    are chosen by harm."""
    _, keep = forms_and_keep(choice, decisions)
    forms = {
        layer: choice[decision.group].form.clipped(keep.get(source or "", inputs), keep[decision.group])
        for decision in decisions
        for layer, (source, inputs) in zip(decision.decomposed, decision.reads, strict=True)
    }
    narrowed = {d.group: keep[d.group] for d in decisions if keep[d.group] < d.widths[0]}
    choose: FilterChoice = "harm" if narrowed else "angles"
    return CompressionPlan(architecture, {}, narrowed, note, choose=choose).with_decompositions(forms)


def untouched(decisions: Sequence[Decision]) -> dict[str, Option]:
    """The choice that leaves the model dense."""
    return {decision.group: decision.options[0] for decision in decisions}

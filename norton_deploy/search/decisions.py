"""What a planner may decide: for each channel group, its rank and how many filters it keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from norton_deploy.compression.channel_groups import channel_groups
from norton_deploy.compression.surgery import output_width
from norton_deploy.method.cp import max_rank
from norton_deploy.method.plan import CompressionPlan

RANKS = (1, 2, 4)
FRACTIONS = (0.75, 0.5, 0.375, 0.25)
STEMS = ("conv1", "backbone.body.conv1")


@dataclass(frozen=True)
class Option:
    """One choice for a group: CP rank of its convolutions (0: not decomposed) and number of kept filters."""

    rank: int
    keep: int


@dataclass(frozen=True)
class Decision:
    """A channel group and its options; coupled layers (a residual stage, the pyramid's levels) are one group.

    Attributes:
        group: name of the channel group.
        decomposed: its producers that get the rank; 1x1 convolutions and linear layers have none.
        ranks: ranks to choose from, 0 (not decomposed) first.
        widths: numbers of filters to choose from, the whole width first.
    """

    group: str
    decomposed: tuple[str, ...]
    ranks: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """All combinations, the untouched group first."""
        return tuple(Option(rank, width) for rank in self.ranks for width in self.widths)


Choice = Mapping[str, Option]
"""Group name -> its option, for every decision."""


def list_decisions(
    model: nn.Module,
    *,
    ranks: tuple[int, ...] = RANKS,
    fractions: tuple[float, ...] = FRACTIONS,
    multiple: int = 16,
) -> list[Decision]:
    """All decisions about a dense model.

    Args:
        model: classifier or detector.
        ranks: CP ranks to consider; those above eq. 8 are left out. A network's stem is never decomposed.
        fractions: shares of a group's filters to consider keeping.
        multiple: kept numbers are rounded to multiples of this, because engines compute in blocks of channels.
    """
    decisions = []
    for name, group in channel_groups(model).items():
        layers = {producer: model.get_submodule(producer) for producer in group.producers}
        width = output_width(next(iter(layers.values())))
        kept = (max(multiple, round(width * fraction / multiple) * multiple) for fraction in fractions)
        widths = (width, *sorted({count for count in kept if count < width}, reverse=True))
        convolutions = {
            producer: layer
            for producer, layer in layers.items()
            if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 and producer not in STEMS
        }
        limit = min(
            (
                max_rank(layer.in_channels, layer.kernel_size[0], layer.kernel_size[1])
                for layer in convolutions.values()
            ),
            default=0,
        )
        possible = (0, *(rank for rank in sorted(ranks) if rank <= limit))
        decisions.append(Decision(name, tuple(convolutions), possible, widths))
    return decisions


def ranks_and_keep(choice: Choice, decisions: Sequence[Decision]) -> tuple[dict[str, int], dict[str, int]]:
    """Rank of every layer that could be decomposed, 0 if it is not, and kept filters of every group."""
    ranks = {layer: choice[decision.group].rank for decision in decisions for layer in decision.decomposed}
    return ranks, {decision.group: choice[decision.group].keep for decision in decisions}


def to_plan(choice: Choice, decisions: Sequence[Decision], architecture: str, note: str = "") -> CompressionPlan:
    """The plan of a joint choice; what stays whole is not named."""
    ranks, keep = ranks_and_keep(choice, decisions)
    widths = {decision.group: decision.widths[0] for decision in decisions}
    return CompressionPlan(
        architecture,
        {layer: rank for layer, rank in ranks.items() if rank},
        {group: count for group, count in keep.items() if count < widths[group]},
        note,
    )


def untouched(decisions: Sequence[Decision]) -> dict[str, Option]:
    """The choice that leaves the model dense."""
    return {decision.group: decision.options[0] for decision in decisions}

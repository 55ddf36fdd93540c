"""Dense model + plan -> compressed model: decompose first, then prune (paper, section II), or the other way round.

Every tensor of the small model comes from the large one. Names of a plan for a backbone also fit the
backbone inside a detector, and a detector's plan gives its backbone part to a classifier.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from norton_deploy.compression.channel_groups import (
    PYRAMID_GROUP,
    ChannelGroup,
    channel_groups,
    cut_inputs,
    cut_outputs,
    filters_of,
    output_width,
)
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.factored_conv import ChainShape, Decomposed, FactoredConv
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.errors import UserError
from norton_deploy.method.coupled import cluster_filters, decompose_coupled
from norton_deploy.method.cp import CPFactors, decompose_filters
from norton_deploy.method.filter_selection import FilterChoice, Filters, choose_by_angles
from norton_deploy.method.layer_factors import ReshapedCP, Tucker2, decompose_layer
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task

Progress = Callable[[str, int], None]
"""Gets the name of each layer or group when it is done, and how many there are."""


@dataclass(frozen=True)
class Compressed:
    """What `compress_with_kept` made of a dense model.

    Attributes:
        model: the compressed copy, in the mode (training or evaluation) of the dense one.
        kept: of every group that was pruned, or sorted by clusters, the channels of the dense model that are left,
            int64 [O'] in their present order: ascending unless the group has coupled layers.
    """

    model: nn.Module
    kept: dict[str, Tensor]


def compress(
    model: nn.Module,
    plan: CompressionPlan,
    *,
    seed: int = 0,
    starts: int = 4,
    choose: FilterChoice = choose_by_angles,
    progress: Progress | None = None,
) -> nn.Module:
    """Compress a copy of a dense model; see `compress_with_kept`, which also tells the kept channels.

    Raises:
        UserError: the plan does not fit the model.
    """
    return compress_with_kept(model, plan, seed=seed, starts=starts, choose=choose, progress=progress).model


def compress_with_kept(
    model: nn.Module,
    plan: CompressionPlan,
    *,
    seed: int = 0,
    starts: int = 4,
    choose: FilterChoice = choose_by_angles,
    chosen: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress a copy of a dense model.

    Phase 1 replaces every planned convolution: by a CPDBlock of its filters' CP factors (eq. 2, eq. 4-7), or by a
    FactoredConv where the filters share factors. Phase 2 chooses every planned group's filters by the principal angles
    between those factors (eq. 11, Algorithm 1) and cuts all others out of the producers, their normalisation and all
    readers. Distances are those of the dense layer's factors, before any input channel is cut. Those of coupled
    producers are summed, so that they keep the same channels. Filters without CP factors of their own are compared as
    vectors.

    A plan with `first: prune` has its filters chosen likewise; the layers are then cut while dense, and what is left of
    them is decomposed.

    Filters in clusters have to stand beside each other. The channels of such a group are sorted first, in all its
    producers, normalisations and readers, so nothing is left to reorder when the model runs. Pruning takes equally many
    filters out of each cluster.

    Args:
        model: a classifier or detector with dense convolutions; it is not changed.
        plan: its forms, ranks and kept filters.
        seed: seed of the decomposition's random starts.
        starts: starts per decomposition; the best is kept per filter.
        choose: which filters of a group survive: by default eq. 11 and Algorithm 1.
        chosen: group -> the filters that survive, of groups that are not left to `choose` (`choose_by_harm`).
        progress: told of each layer or group.

    Raises:
        UserError: the plan does not fit the model.
    """
    plan = fit_plan(model, plan)
    small, groups = copy.deepcopy(model), channel_groups(model)
    known = chosen or {}
    rest = {name: count for name, count in plan.keep.items() if name not in known}
    prunes_first = plan.first == "prune"
    judges = not prunes_first or bool(rest)  # else all that survives is known before anything is decomposed
    steps = len(plan.decomposed) * (judges + prunes_first) + len(rest)
    report = progress or (lambda name, steps: None)
    kept = _cluster_orders(model, groups, plan)
    _cut_groups(small, groups, kept)

    def decompose(model: nn.Module) -> nn.Module:
        for name in plan.decomposed:
            try:
                model.set_submodule(name, _decompose(_convolution(model, name), plan, name, seed, starts))
            except UserError as error:  # the plan fits the dense layers, not always what pruning leaves of them
                raise UserError(f"{plan.source}: layer '{name}': {error}") from None
            report(name, steps)
        return model

    judged = decompose(copy.deepcopy(small) if prunes_first else small) if judges else small
    survivors = {**known, **_chosen_filters(judged, groups, rest, choose, lambda name: report(name, steps))}
    _cut_groups(small, groups, survivors)
    if prunes_first:
        decompose(small)
    kept |= {name: kept[name][index] if name in kept else index for name, index in survivors.items()}
    for name, layer in model.named_modules():
        if any(not parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            small.get_submodule(name).requires_grad_(False)
    return Compressed(small.train(model.training), kept)


def apply_structure(model: nn.Module, plan: CompressionPlan) -> nn.Module:
    """Give `model` the shapes of the plan, in place, with meaningless weights; for loading saved ones.

    Raises:
        UserError: the plan does not fit the model.
    """
    plan = fit_plan(model, plan)
    groups = channel_groups(model)
    for name in plan.decomposed:
        model.set_submodule(name, _shaped(_convolution(model, name), plan, name))
    first = _chosen_filters(model, groups, plan.keep, lambda filters, count: torch.arange(count), lambda name: None)
    _cut_groups(model, groups, first)
    return model


def _cluster_orders(model: nn.Module, groups: dict[str, ChannelGroup], plan: CompressionPlan) -> dict[str, Tensor]:
    """Group -> its channels [O] sorted by the clusters of its coupled layers, which cluster their filters together."""
    orders = {}
    for name, group in groups.items():
        coupled = [producer for producer in group.producers if producer in plan.coupled]
        if coupled:
            weights = [_convolution(model, producer).weight.detach() for producer in coupled]
            rank = max(plan.coupled[producer].rank for producer in coupled)
            cluster = cluster_filters(weights, rank, plan.coupled[coupled[0]].clusters)
            orders[name] = cluster.argsort(stable=True)
    return orders


def _decompose(conv: nn.Conv2d, plan: CompressionPlan, name: str, seed: int, starts: int) -> Decomposed:
    """The layer in the form that the plan gives it; the filters of a coupled one are sorted by cluster already."""
    weight = conv.weight.detach()
    if name in plan.ranks:
        return CPDBlock.from_factors(decompose_filters(weight, plan.ranks[name], seed=seed, starts=starts), conv)
    if name in plan.coupled:
        rank, clusters = plan.coupled[name].rank, plan.coupled[name].clusters
        cluster = torch.arange(clusters, device=weight.device).repeat_interleave(len(weight) // clusters)
        return FactoredConv.from_factors(decompose_coupled(weight, rank, clusters, cluster=cluster), conv)
    if name in plan.tucker:
        input_rank, output_rank = plan.tucker[name]
        factors = decompose_layer(weight, "tucker2", (output_rank, input_rank))
    else:
        factors = decompose_layer(weight, "reshaped", (plan.layer_cp[name],), seed=seed, starts=starts)
    assert isinstance(factors, Tucker2 | ReshapedCP)
    return FactoredConv.from_factors(factors, conv)


def _shaped(conv: nn.Conv2d, plan: CompressionPlan, name: str) -> Decomposed:
    """The layer in the form that the plan gives it, with meaningless weights."""
    widths = conv.in_channels, conv.out_channels
    if name in plan.ranks:
        return CPDBlock.shaped_like(conv, *widths, plan.ranks[name])
    if name in plan.coupled:
        rank, clusters = plan.coupled[name].rank, plan.coupled[name].clusters
        shape = ChainShape(rank * clusters, conv.out_channels, clusters, has_exit=False)
    elif name in plan.tucker:
        shape = ChainShape(*plan.tucker[name])
    else:
        shape = ChainShape(plan.layer_cp[name], plan.layer_cp[name], plan.layer_cp[name])
    return FactoredConv.shaped_like(conv, shape, *widths)


def _chosen_filters(
    model: nn.Module,
    groups: dict[str, ChannelGroup],
    keep: Mapping[str, int],
    choose: FilterChoice,
    report: Callable[[str], None],
) -> dict[str, Tensor]:
    """Group -> filters to keep, int64 [O'] ascending, of all groups that lose any."""
    kept = {}
    for name, count in keep.items():
        layers = [model.get_submodule(producer) for producer in groups[name].producers]
        width = output_width(layers[0])
        if count < width:
            filters = [filters_of(layer) for layer in layers]
            clusters = max(layer.clusters if isinstance(layer, FactoredConv) else 1 for layer in layers)
            parts = torch.arange(width).split(width // clusters)
            kept[name] = torch.cat([part[choose(_some(filters, part), count // clusters)] for part in parts])
        report(name)
    return kept


def _some(layers: Sequence[Filters], index: Tensor) -> list[Filters]:
    """The filters `index` of each layer."""
    return [part.select_filters(index) if isinstance(part, CPFactors) else part[index] for part in layers]


def _cut_groups(model: nn.Module, groups: dict[str, ChannelGroup], kept: dict[str, Tensor]) -> None:
    """Cut each group's channels, in place: producers, normalisation, readers."""
    for name, index in kept.items():
        group = groups[name]
        for layer in (*group.producers, *group.norms):
            model.set_submodule(layer, cut_outputs(model.get_submodule(layer), index))
        for reader in group.readers:
            small = cut_inputs(model.get_submodule(reader.layer), index, reader.columns)
            model.set_submodule(reader.layer, small)
        if name == PYRAMID_GROUP:
            cast(BackboneWithFPN, model.get_submodule("backbone")).out_channels = len(index)


def _convolution(model: nn.Module, name: str) -> nn.Conv2d:
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)  # fit_plan has checked it.
    return conv


def build_detector(
    task: Task, settings: DetectorSettings | None = None, plan: CompressionPlan | None = None
) -> FasterRCNN:
    """A Faster (box), Mask (mask) or Keypoint (keypoint) R-CNN, dense or compressed by `plan`.

    The weights are random; a compressed detector is a random dense one that went through `compress`.

    Raises:
        UserError: unknown task, impossible settings, or a plan that does not fit.
    """
    model = (settings or DetectorSettings()).build(task)
    return model if plan is None else cast(FasterRCNN, compress(model, plan, starts=1))


def build_classifier(settings: ClassifierSettings, plan: CompressionPlan | None = None) -> nn.Module:
    """A classifier with random weights, dense or compressed by `plan`.

    Raises:
        UserError: unknown architecture or a plan that does not fit.
    """
    model = settings.build()
    return model if plan is None else compress(model, plan, starts=1)

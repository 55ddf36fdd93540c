"""Dense model + plan -> compressed model: decompose first, then prune (paper, section II).

Every tensor of the small model comes from the large one. Names of a plan for a backbone also fit the
backbone inside a detector, and a detector's plan gives its backbone part to a classifier.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
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
    filter_rows,
    is_detector,
    output_width,
)
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.errors import UserError
from norton_deploy.method.cp import decompose_filters, max_rank
from norton_deploy.method.filter_selection import FilterChoice, choose_by_angles
from norton_deploy.method.plan import WHOLE_DETECTOR, CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task

BODY = "backbone.body."
OPTIONAL_HEADS = ("mask", "keypoint")


Progress = Callable[[str, int], None]
"""Gets the name of each layer or group when it is done, and how many there are."""


@dataclass(frozen=True)
class Compressed:
    """What `compress_with_kept` made of a dense model.

    Attributes:
        model: the compressed copy, in the mode (training or evaluation) of the dense one.
        kept: of every pruned group the kept channels of the dense model, int64 [O'] ascending.
    """

    model: nn.Module
    kept: dict[str, Tensor]


def fit_plan(model: nn.Module, plan: CompressionPlan) -> CompressionPlan:
    """The plan in the names of `model`, checked against it.

    A backbone's plan gets the backbone's prefix in a detector; a detector's plan loses it in a classifier;
    entries of a mask or keypoint head that this detector does not have are left out.

    Raises:
        UserError: an unknown layer or group, an impossible rank or count; the message names the layer.
    """
    if is_detector(model) and plan.architecture != WHOLE_DETECTOR:
        plan = plan.with_prefix(WHOLE_DETECTOR, BODY)
    elif not is_detector(model) and plan.architecture == WHOLE_DETECTOR:
        plan = plan.within_prefix(plan.architecture, BODY)
    absent = tuple(
        f"roi_heads.{head}_"
        for head in OPTIONAL_HEADS
        if is_detector(model) and getattr(model.roi_heads, f"{head}_head", None) is None
    )
    ranks = {name: rank for name, rank in plan.ranks.items() if not (absent and name.startswith(absent))}
    keep = {name: count for name, count in plan.keep.items() if not (absent and name.startswith(absent))}
    layers = dict(model.named_modules())
    for name, rank in ranks.items():
        _check_rank(plan, name, layers, rank)
    groups = channel_groups(model)
    for name, count in keep.items():
        if name not in groups:
            raise UserError(f"{plan.source}: keep: unknown group '{name}'{_hint(name, groups)}")
        width = output_width(layers[groups[name].producers[0]])
        if count > width:
            raise UserError(f"{plan.source}: keep: '{name}' has {width} filters, cannot keep {count}")
    return replace(plan, ranks=ranks, keep=keep)


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
    progress: Progress | None = None,
) -> Compressed:
    """Compress a copy of a dense model.

    Phase 1 replaces every planned convolution by a CPDBlock of its filters' CP factors (eq. 2, eq. 4-7);
    phase 2 chooses every planned group's filters by the principal angles between those factors (eq. 11,
    Algorithm 1) and cuts all others out of the producers, their normalisation and all readers. Distances are
    those of the dense layer's factors, before any input channel is cut. Those of coupled producers are summed,
    so that they keep the same channels. Filters of layers that are not decomposed are compared as vectors.

    Args:
        model: a classifier or detector with dense convolutions; it is not changed.
        plan: its ranks and kept filters.
        seed: seed of the decomposition's random starts.
        starts: starts per decomposition; the best is kept per filter.
        choose: which filters of a group survive: by default eq. 11 and Algorithm 1.
        progress: told of each layer or group.

    Raises:
        UserError: the plan does not fit the model.
    """
    plan = fit_plan(model, plan)
    small = copy.deepcopy(model)
    steps = len(plan.ranks) + len(plan.keep)
    report = progress or (lambda name, steps: None)
    for name, rank in plan.ranks.items():
        conv = _convolution(model, name)
        factors = decompose_filters(conv.weight.detach(), rank, seed=seed, starts=starts)
        small.set_submodule(name, CPDBlock.from_factors(factors, conv))
        report(name, steps)
    groups = channel_groups(model)
    kept = _chosen_filters(small, groups, plan.keep, choose, lambda name: report(name, steps))
    _cut_groups(small, groups, kept)
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
    for name, rank in plan.ranks.items():
        conv = _convolution(model, name)
        block = CPDBlock.shaped_like(conv, conv.in_channels, conv.out_channels, rank)
        model.set_submodule(name, block)
    kept = {
        name: torch.arange(count)
        for name, count in plan.keep.items()
        if count < output_width(model.get_submodule(groups[name].producers[0]))
    }
    _cut_groups(model, groups, kept)
    return model


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
        if count < output_width(layers[0]):
            filters = [layer.factors() if isinstance(layer, CPDBlock) else filter_rows(layer) for layer in layers]
            kept[name] = choose(filters, count)
        report(name)
    return kept


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


def _check_rank(plan: CompressionPlan, name: str, layers: dict[str, nn.Module], rank: int) -> None:
    conv = layers.get(name)
    if conv is None:
        candidates = {key: layer for key, layer in layers.items() if isinstance(layer, nn.Conv2d)}
        raise UserError(f"{plan.source}: ranks: unknown layer '{name}'{_hint(name, candidates)}")
    if isinstance(conv, CPDBlock):
        raise UserError(f"{plan.source}: ranks: layer '{name}' is already decomposed; start from the dense model")
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or max(conv.kernel_size) == 1:
        raise UserError(
            f"{plan.source}: ranks: layer '{name}' cannot be decomposed; only ungrouped convolutions with a kernel "
            "larger than 1x1 can (1x1 convolutions are pruned, under 'keep')"
        )
    largest = max_rank(conv.in_channels, conv.kernel_size[0], conv.kernel_size[1])
    if rank > largest:
        raise UserError(f"{plan.source}: ranks: layer '{name}': rank {rank} is above its maximum {largest} (eq. 8)")


def _hint(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


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

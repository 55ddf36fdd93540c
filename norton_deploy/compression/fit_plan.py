"""A plan in the names of one model, checked against it."""

import math
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from norton_deploy.compression.channel_groups import channel_groups, is_detector, output_width
from norton_deploy.compression.factored_conv import Decomposed
from norton_deploy.errors import UserError
from norton_deploy.method.coupled import check_coupled
from norton_deploy.method.cp import max_rank
from norton_deploy.method.plan import FORMS, WHOLE_DETECTOR, CompressionPlan

BODY = "backbone.body."
OPTIONAL_HEADS = ("mask", "keypoint")


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
    plan = plan.renamed(lambda name: None if absent and name.startswith(absent) else name)
    layers = dict(model.named_modules())
    groups = channel_groups(model)
    for name, count in plan.keep.items():
        if name not in groups:
            raise UserError(f"{plan.source}: keep: unknown group '{name}'{_hint(name, groups)}")
        width = output_width(layers[groups[name].producers[0]])
        if count > width:
            raise UserError(f"{plan.source}: keep: '{name}' has {width} filters, cannot keep {count}")
    for kind in FORMS:
        for name in getattr(plan, kind):
            conv = _decomposable(plan, kind, name, layers)
            try:
                _check_ranks(plan, kind, name, conv)
            except UserError as error:
                raise UserError(f"{plan.source}: {kind}: layer '{name}': {error}") from None
    for group in groups.values():
        clusters = {plan.coupled[name].clusters for name in group.producers if name in plan.coupled}
        if len(clusters) > 1:
            raise UserError(
                f"{plan.source}: coupled: the layers of '{group.name}' write the same channels and need equally many "
                f"clusters, found {sorted(clusters)}"
            )
        count = plan.keep.get(group.name, 0)
        if clusters and count % min(clusters):
            raise UserError(f"{plan.source}: keep: '{group.name}': {count} filters in {min(clusters)} equal clusters")
    return plan


def _decomposable(plan: CompressionPlan, kind: str, name: str, layers: dict[str, nn.Module]) -> nn.Conv2d:
    conv = layers.get(name)
    if conv is None:
        candidates = {key: layer for key, layer in layers.items() if isinstance(layer, nn.Conv2d)}
        raise UserError(f"{plan.source}: {kind}: unknown layer '{name}'{_hint(name, candidates)}")
    if isinstance(conv, Decomposed):
        raise UserError(f"{plan.source}: {kind}: layer '{name}' is already decomposed; start from the dense model")
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or max(conv.kernel_size) == 1:
        raise UserError(
            f"{plan.source}: {kind}: layer '{name}' cannot be decomposed; only ungrouped convolutions with a kernel "
            "larger than 1x1 can (1x1 convolutions are pruned, under 'keep')"
        )
    return conv


def _check_ranks(plan: CompressionPlan, kind: str, name: str, conv: nn.Conv2d) -> None:
    """Raise UserError if a form is impossible for a convolution."""
    out_channels, in_channels, kernel_h, kernel_w = shape = tuple(conv.weight.shape)
    if kind == "coupled":
        check_coupled(
            (out_channels, in_channels, kernel_h, kernel_w), plan.coupled[name].rank, plan.coupled[name].clusters
        )
    elif kind == "tucker":
        for rank, channels in zip(plan.tucker[name], (in_channels, out_channels), strict=True):
            if rank > channels:
                raise UserError(f"rank {rank} is above its {channels} channels")
    elif kind == "layer_cp":
        if plan.layer_cp[name] > math.prod(shape) // max(out_channels, in_channels, kernel_h * kernel_w):
            raise UserError(f"rank {plan.layer_cp[name]} is more than any CPD of a layer {shape} needs")
    elif plan.ranks[name] > (largest := max_rank(in_channels, kernel_h, kernel_w)):
        raise UserError(f"rank {plan.ranks[name]} is above its maximum {largest} (eq. 8)")


def _hint(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"; did you mean {' or '.join(close)}?" if close else ""

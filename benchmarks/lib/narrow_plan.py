"""A plan for a detector with narrower or fewer layers than the one that the plan was made for."""

from torch import nn

from norton_deploy.compression.compress import channel_groups, fit_plan
from norton_deploy.compression.surgery import output_width
from norton_deploy.method.plan import CompressionPlan


def narrow_plan(plan: CompressionPlan, model: nn.Module, full: nn.Module) -> CompressionPlan:
    """The same shares of filters for a detector with other widths.

    Args:
        plan: made for `full`; configs/plans/ holds plans for torchvision's widths.
        model: detector with the same backbone, but a narrower pyramid or heads with narrower or fewer layers.
        full: the detector that `plan` fits.

    Returns:
        Ranks of all layers that `model` has; of every group the share of filters that `plan` keeps, rounded.

    Raises:
        UserError: the plan does not fit `full`.
    """
    fitted = fit_plan(full, plan)
    layers = dict(model.named_modules())
    groups, full_groups = channel_groups(model), channel_groups(full)
    keep = {}
    for name, count in fitted.keep.items():
        if name in groups:
            width = output_width(model.get_submodule(groups[name].producers[0]))
            share = count / output_width(full.get_submodule(full_groups[name].producers[0]))
            keep[name] = max(1, round(share * width))
    ranks = {name: rank for name, rank in fitted.ranks.items() if name in layers}
    return CompressionPlan(fitted.architecture, ranks, keep, fitted.note)

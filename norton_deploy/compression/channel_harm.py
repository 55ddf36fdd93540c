"""Which channels of a group the next layers miss least, when they may make up for the others from those that are left.

Angles between filters (eq. 11) ask which filters are alike. This asks what the readers of the channels lose on a few
unlabelled images: with the second moments M of the channels and T = sum of W^T W of the readers' kernels, keeping the
set S and predicting the others from it by least squares loses tr(T (M - M[:, S] M[S, S]^-1 M[S, :])), and the refit
does exactly that. Channels are taken greedily, each time the one that lowers the loss most.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from norton_deploy.compression.calibration import Probe, run_stages
from norton_deploy.compression.channel_groups import ChannelGroup, Reader, channel_groups, output_width
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.method.plan import CompressionPlan

POSITIONS = 2048
"""Of the channels, taken from each call of a reader."""
RIDGE = 1e-6
"""Of the mean second moment: channels that repeat each other are not told apart below it."""


@torch.no_grad()
def choose_by_harm(
    dense: nn.Module, plan: CompressionPlan, probes: Sequence[Probe], *, seed: int = 0
) -> dict[str, Tensor]:
    """The channels to keep of every group that the plan narrows, but for those with coupled layers.

    Args:
        dense: classifier or detector, in evaluation mode.
        plan: says how many channels each group keeps.

    Returns:
        Group -> kept channels [O'], int64, ascending.
    """
    plan = fit_plan(dense, plan)
    groups = {
        name: group
        for name, group in channel_groups(dense).items()
        if plan.keep.get(name, 0)
        and plan.keep[name] < output_width(dense.get_submodule(group.producers[0]))
        and not any(producer in plan.coupled for producer in group.producers)
    }
    moments = channel_moments(dense, groups, probes, seed)
    return {
        name: greedy_channels(moments[name], reader_metric(dense, group), plan.keep[name]).sort().values
        for name, group in groups.items()
    }


def greedy_channels(moments: Tensor, metric: Tensor, keep: int) -> Tensor:
    """The `keep` channels from which the others are predicted with least loss, greedily.

    A pivoted Cholesky factorisation of the moments: what is not predicted yet, M - L L^T, is never formed, only its
    diagonal and the gains, so a step costs two products of a matrix and a vector.

    Args:
        moments: M [C, C], second moments of the channels.
        metric: T [C, C], what an error of the channels costs.
        keep: 1 to C.

    Returns:
        [keep] int64, in the order in which they are taken: a beginning is the choice of so many.
    """
    m, t = moments.double(), metric.double()
    m = m + RIDGE * m.diagonal().mean() * torch.eye(len(m), dtype=torch.float64)
    left = m.diagonal().clone()  # of each channel, what is not predicted yet
    cost = torch.einsum("ij,ij->j", m, t @ m)  # the diagonal of rest T rest
    known = m.new_zeros(len(m), keep)
    order = torch.zeros(keep, dtype=torch.int64)
    taken = torch.zeros(len(m), dtype=torch.bool)
    for step in range(keep):
        # taking channel j predicts rest[:, j] rest[j, :] / rest[j, j] of what is left
        gain = cost / left.clamp_min(torch.finfo(torch.float64).tiny)
        best = int(gain.masked_fill(taken, -torch.inf).argmax())
        order[step], taken[best] = best, True
        so_far = known[:, :step]
        column = m[:, best] - so_far @ so_far[best]
        priced = t @ column
        share = column / left[best]
        cost = cost - 2 * share * (m @ priced - so_far @ (so_far.mT @ priced)) + share.square() * (column @ priced)
        known[:, step] = column * left[best].rsqrt()
        left = left - column * share
    return order


def channel_loss(moments: Tensor, metric: Tensor, kept: Tensor) -> float:
    """Share of the readers' squared outputs that is lost: tr(T (M - M[:, S] M[S, S]^-1 M[S, :])) / tr(T M), 0 to 1.

    Args:
        moments: M [C, C], second moments of the channels.
        metric: T [C, C], what an error of the channels costs.
        kept: S, int64.
    """
    m, t = moments.double(), metric.double()
    among = m[kept][:, kept] + RIDGE * m.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    predicted = m[:, kept] @ torch.linalg.solve(among, m[kept])
    whole = (t * m).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((1 - (t * predicted).sum() / whole).clamp(0, 1))


def channel_moments(
    dense: nn.Module, groups: Mapping[str, ChannelGroup], probes: Sequence[Probe], seed: int
) -> dict[str, Tensor]:
    """M of every group, from what its readers read."""
    generator = torch.Generator().manual_seed(seed)
    moments: dict[str, Tensor] = {}

    def add(name: str, reader: Reader, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        rows = x.movedim(1, -1).flatten(0, -2) if x.ndim == 4 else x.unflatten(1, (-1, reader.columns)).mT.flatten(0, 1)
        rows = rows[torch.randperm(len(rows), generator=generator)[:POSITIONS]]
        moments[name] = moments.get(name, torch.zeros(())) + rows.mT @ rows

    with ExitStack() as hooks:
        for name, group in groups.items():
            for reader in group.readers:
                layer = dense.get_submodule(reader.layer)
                hooks.enter_context(layer.register_forward_pre_hook(partial(add, name, reader)))
        for probe in probes:
            run_stages(dense, probe)
    return moments


def reader_metric(dense: nn.Module, group: ChannelGroup) -> Tensor:
    """T of a group, each reader's share of like size."""
    total = torch.zeros(())
    for reader in group.readers:
        layer = dense.get_submodule(reader.layer)
        weight = cast(Tensor, layer.weight).detach()
        if isinstance(layer, nn.ConvTranspose2d):
            weight = weight.transpose(0, 1)
        kernels = weight.flatten(1).unflatten(1, (-1, weight[0].numel() // (weight.shape[1] // reader.columns)))
        metric = torch.einsum("oik,ojk->ij", kernels, kernels)
        total = total + metric / metric.diagonal().sum().clamp_min(torch.finfo(metric.dtype).tiny)
    return total

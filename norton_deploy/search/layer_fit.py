"""What a layer becomes by one choice, in closed form from the second moments of its inputs, as dense weights.

A search asks this of hundreds of choices. The moments are those of the dense model, so a choice is fitted as if nothing
before it had changed; what is fitted to are the dense layer's own weights, so that only their metric comes from data.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from norton_deploy.compression.chain_fit import ChainKernels, fit_chain
from norton_deploy.compression.channel_groups import ChannelGroup
from norton_deploy.compression.channel_harm import RIDGE
from norton_deploy.compression.normal_equations import NormalEquations, fit_factors
from norton_deploy.compression.refit import input_patches
from norton_deploy.method.coupled import cluster_filters
from norton_deploy.method.cp import decompose_filters
from norton_deploy.method.layer_factors import decompose_layer
from norton_deploy.method.plan import Decomposition

SAMPLES = 6144
"""Positions of a layer, all probes and calls together."""
JUDGED_FILTERS = 64
SHRINKAGE = 1e-2
"""Of the moments towards a multiple of the identity, under which the fit is that of bare weights."""


def input_moments(
    model: nn.Module, layers: Sequence[str], run: Callable[[int], object], probes: int, seed: int = 0
) -> dict[str, NormalEquations]:
    """Second moments of the input patches of convolutions, with no outputs, from sampled positions.

    Args:
        model: dense, in evaluation mode.
        layers: names of convolutions.
        run: runs the model on a probe, 0 to `probes` - 1.
        probes: number of probes.
        seed: of the choice of positions.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[tuple[Tensor, int]]] = {}
    found = {name: NormalEquations.empty(model.get_parameter(f"{name}.weight")[0].numel(), 0) for name in layers}

    def see(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(name, []).append((inputs[0], output.numel() // output.shape[1]))

    with ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(see, name)))
        for number in range(probes):
            seen.clear()
            run(number)
            for name, calls in seen.items():
                share = max(1, SAMPLES // (probes * len(calls)))
                for inputs, positions in calls:
                    sampled = torch.randperm(positions, generator=generator)[:share]
                    patches = input_patches(model.get_submodule(name), inputs, sampled)
                    found[name].add(patches, patches[:, :0])
    return found


def problem_of(conv: nn.Conv2d, moments: NormalEquations) -> NormalEquations:
    """The least squares that a decomposition of a layer has to solve: the layer's own outputs from its inputs.

    Args:
        conv: the dense layer; with a bias the moments are centred, since the bias makes up for the means.
        moments: of its input patches, without outputs.
    """
    weight = conv.weight.detach().flatten(1).double()
    found = moments if conv.bias is None else moments.centred()
    gram = found.gram / max(found.samples, 1)
    level = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    gram = (1 - SHRINKAGE) * gram + SHRINKAGE * level * torch.eye(len(gram), dtype=torch.float64)
    cross = gram @ weight.mT
    energy = torch.einsum("of,fo->o", weight, cross)
    return NormalEquations(1, gram, cross, energy, torch.zeros(len(gram)).double(), torch.zeros(len(weight)).double())


def fitted_weight(
    weight: Tensor, problem: NormalEquations, form: Decomposition, order: Tensor | None = None, *, seed: int = 0
) -> Tensor:
    """The weights [O, I, Kh, Kw] of a layer in a decomposed form, fitted to its inputs.

    Args:
        weight: of the dense layer.
        problem: `problem_of` the layer.
        form: with ranks that are possible for it.
        order: of coupled filters, sorted by clusters [O]; None finds the clusters.
        seed: of a CPD's start.
    """
    weight = weight.detach()
    count, channels, kernel_h, kernel_w = weight.shape
    numbers = form.numbers
    if form.form == "ranks":
        factors = decompose_filters(weight, numbers[0], seed=seed, starts=1)
        return fit_factors(problem, factors, sweeps=0).reconstruct()
    best = weight.flatten(1).double()

    def shaped(first: int, last: int, groups: int, has_exit: bool) -> ChainKernels:
        exit = best.new_zeros(count, last, 1, 1) if has_exit else None
        middle = best.new_zeros(last, first // groups, kernel_h, kernel_w)
        return ChainKernels(best.new_zeros(first, channels, 1, 1), middle, exit, groups)

    if form.form == "coupled":
        rank, clusters = numbers
        order = clustered([weight], form) if order is None else order
        present = shaped(rank * clusters, count, clusters, has_exit=False)
        fitted = fit_chain(problem.of_outputs(order), present, sweeps=0, best=best[order]).weight()
        return fitted[order.argsort()].float()
    if form.form == "tucker":
        return (
            fit_chain(problem, shaped(numbers[0], numbers[1], 1, has_exit=True), sweeps=0, best=best).weight().float()
        )
    start = decompose_layer(weight, "reshaped", numbers, seed=seed, starts=1, sweeps=10)
    kernels = start.spatial.permute(2, 0, 1)[:, None].double()  # type: ignore[union-attr]  # CPD has it
    entry, exit = (factor.double()[:, :, None, None] for factor in (start.input.mT, start.output))
    return fit_chain(problem, ChainKernels(entry, kernels, exit, numbers[0]), sweeps=0).weight().float()


def judged_filters(count: int, form: Decomposition) -> Tensor:
    """The filters [O'] by which a form's error is judged: of the filters' own CPD, each with a large system of its own
    to solve, some evenly spread; of a form whose filters share factors all."""
    return torch.arange(count)[:: max(1, count // JUDGED_FILTERS) if form.form == "ranks" else 1]


def clustered(weights: Sequence[Tensor], form: Decomposition) -> Tensor:
    """The order [O] in which filters of layers that write the same channels stand by clusters."""
    return cluster_filters(weights, *form.numbers).argsort(stable=True)


def absorbed(model: nn.Module, group: ChannelGroup, moments: Tensor, kept: Tensor) -> Mapping[str, Tensor]:
    """Weights of a group's readers that take nothing from the channels that go, and make up for them from the others.

    Args:
        model: dense.
        group: whose channels are narrowed.
        moments: second moments of the channels [C, C], float64.
        kept: channels that stay [C'].

    Returns:
        Reader -> weights of the dense shape, zero for the channels that go.
    """
    predict = torch.zeros_like(moments)  # channel = sum over kept of predict[kept, channel] * kept
    level = RIDGE * moments.diagonal().mean().clamp_min(torch.finfo(moments.dtype).tiny)
    among = moments[kept][:, kept] + level * torch.eye(len(kept), dtype=moments.dtype)
    predict[kept] = torch.linalg.solve(among, moments[kept])
    predict[:, kept] = torch.eye(len(moments), dtype=moments.dtype)[:, kept]
    found = {}
    for reader in group.readers:
        layer = model.get_submodule(reader.layer)
        weight = cast(Tensor, layer.weight).detach()
        if isinstance(layer, nn.ConvTranspose2d):
            found[reader.layer] = torch.einsum("kc,c...->k...", predict.to(weight), weight)
        else:
            wide = weight.unflatten(1, (-1, reader.columns))
            found[reader.layer] = torch.einsum("kc,oc...->ok...", predict.to(weight), wide).flatten(1, 2)
    return found

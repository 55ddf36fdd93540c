"""Factors from data, without labels: each layer is fitted to give the dense layer's outputs from the inputs it now has.

Decomposition and pruning change what every later layer reads. In the order of the data, each layer of the small
model is solved again by least squares on sampled positions of unlabelled images: the wanted outputs are the dense
layer's, the inputs those that the small model computes with all earlier layers already refitted. All that is needed of
the images are second moments, of a size that does not depend on their number. A plain layer has one closed form, a
FactoredConv the forms of `fit_chain`, and a CPDBlock has one for each factor given the other two. Layers that do not
read each other share their passes over the images, and passes begin behind what is final (`Frontier`).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from norton_deploy.compression.calibration import Probe, run_stages
from norton_deploy.compression.chain_fit import ChainKernels, fit_chain
from norton_deploy.compression.channel_groups import channel_groups
from norton_deploy.compression.compress import Progress
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.factored_conv import Decomposed, FactoredConv
from norton_deploy.compression.frontier import Frontier
from norton_deploy.compression.normal_equations import RIDGES, NormalEquations, fit_factors
from norton_deploy.method.cp import CPFactors

SAMPLES = 8192
SWEEPS = 2
TRIAL_FILTERS = 64
"""So many filters of a CPDBlock, evenly spread, choose its ridge: each has a system of its own to solve."""
EXACT = 1e-10
"""Relative squared error below which a layer is left alone."""


@dataclass(frozen=True)
class LayerRefit:
    """One layer's relative squared error on the sampled positions, before and after."""

    name: str
    error_before: float
    error_after: float


@dataclass
class _Call:
    """Sampled output positions of one call of a layer, and the dense layer's outputs there, [P, O']."""

    positions: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class _Solution:
    """What a layer may become: weights [O, F], bias [O] if it has one, and a decomposed layer's factors."""

    weight: Tensor
    bias: Tensor | None
    factors: CPFactors | ChainKernels | None


class _Reached(Exception):  # noqa: N818 (ends a forward pass early, nothing went wrong)
    """The layers in question have been called for the last time."""


@torch.no_grad()
def refit(
    small: nn.Module,
    dense: nn.Module,
    kept: dict[str, Tensor],
    probes: Sequence[Probe],
    *,
    samples: int = SAMPLES,
    sweeps: int = SWEEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerRefit]:
    """Refit the layers of `small`, in place.

    Transposed convolutions are left as they are. The layers' biases are refitted with their weights;
    normalisations stay (`reestimate_batch_norm` is for those).

    Args:
        small: what `compress` made of `dense`.
        dense: the model it was made from.
        kept: kept channels of every pruned group, as `compress_with_kept` tells them.
        probes: batches of images (`make_probes`).
        samples: output positions per layer, or twice its number of inputs if that is more.
        sweeps: rounds over the factors of a decomposed layer.
        seed: of the choice of positions.
        progress: told of each batch that the dense model has seen, then of each layer.

    Returns:
        What happened to each layer, in order. The error on the sampled positions never rises: a filter, or a layer
        whose filters share factors, is left as it was if its error would.
    """
    modes = small.training, dense.training
    small.eval(), dense.eval()
    channels = {
        producer: kept[name]
        for name, group in channel_groups(dense).items()
        if name in kept
        for producer in group.producers
    }
    readers = {
        reader.layer: (kept[name], reader.columns)
        for name, group in channel_groups(dense).items()
        if name in kept
        for reader in group.readers
    }
    order = _layers_in_order(small, probes[0])
    report = progress or (lambda name, layers: None)
    steps = len(probes) + len(order)
    targets = _dense_outputs(
        dense,
        order,
        _budgets(small, order, samples),
        channels,
        probes,
        seed,
        lambda number: report(f"batch {number}", steps),
    )
    results: dict[str, LayerRefit] = {}
    with Frontier(small) as frontier:
        for names in _passes(order):
            halves = _collect(small, {name: targets.pop(name) for name in names}, probes, frontier)
            for name in names:
                prior = _cut_weight(dense.get_submodule(name), name, channels, readers)
                results[name] = _refit_layer(small.get_submodule(name), prior, halves.pop(name), name, sweeps)
                report(name, steps)
            pending = [name for name in order if name not in results]
            frontier.advance(pending, lambda: _run_all(small, probes, frontier))
    small.train(modes[0]), dense.train(modes[1])
    return [results[name] for name in order]


def refittable_layers(model: nn.Module) -> list[str]:
    """Names of the layers that `refit` changes: decomposed and linear layers and ungrouped convolutions."""
    inside = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, Decomposed))
    return [name for name, layer in model.named_modules() if _is_refittable(layer) and not name.startswith(inside)]


def _is_refittable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear) or (isinstance(layer, Decomposed) and not isinstance(layer.padding, str))


def _layers_in_order(model: nn.Module, probe: Probe) -> list[str]:
    """The refittable layers in the order in which they are first called."""
    order: dict[str, None] = {}
    with ExitStack() as hooks:
        for name in refittable_layers(model):
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(lambda _m, _i, name=name: order.setdefault(name)))
        run_stages(model, probe)
    return list(order)


def _passes(order: Sequence[str]) -> list[list[str]]:
    """The layers in the order of the data; those that do not read each other's outputs are together."""
    passes: dict[str, list[str]] = {}
    for name in order:
        parent, _, last = name.rpartition(".")
        if name.startswith(("backbone.fpn.inner_blocks.", "backbone.fpn.layer_blocks.")):
            key = name.split(".")[2]
        elif last == "conv1" or name.endswith(".downsample.0"):
            key = f"{name.removesuffix('.conv1').removesuffix('.downsample.0')} reads"
        elif last in ("cls_logits", "bbox_pred", "cls_score"):
            key = f"{parent} answers"
        else:
            key = name
        passes.setdefault(key, []).append(name)
    return list(passes.values())


def _cut_weight(
    layer: nn.Module, name: str, channels: dict[str, Tensor], readers: dict[str, tuple[Tensor, int]]
) -> Tensor:
    """The dense layer's weights [O', F'] of the filters and inputs that are left."""
    weight = cast(Tensor, layer.weight).detach()
    if name in readers:
        index, columns = readers[name]
        weight = weight.unflatten(1, (-1, columns))[:, index].flatten(1, 2)
    return (weight[channels[name]] if name in channels else weight).flatten(1)


def _inputs(layer: nn.Module) -> int:
    """Number of unknowns per filter of a plain layer, or of the convolution that a block stands for."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    conv = cast(nn.Conv2d, layer)  # Or a decomposed layer, which has the same geometry.
    return conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]


def _budgets(model: nn.Module, names: Sequence[str], samples: int) -> dict[str, int]:
    return {name: max(samples, 2 * _inputs(model.get_submodule(name))) for name in names}


def _dense_outputs(
    dense: nn.Module,
    order: Sequence[str],
    budgets: dict[str, int],
    channels: dict[str, Tensor],
    probes: Sequence[Probe],
    seed: int,
    report: Callable[[int], None],
) -> dict[str, list[list[_Call]]]:
    """Layer -> probe -> call -> sampled positions and outputs of the dense layer."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[list[_Call]]] = {name: [] for name in order}

    def record(name: str, output: Tensor) -> None:
        rows = output.flatten(2).transpose(1, 2).flatten(0, 1) if output.ndim == 4 else output
        # Each probe has a like share; a layer that is called per pyramid level gives each level its part.
        share = -(-budgets[name] // len(probes))
        positions = torch.randperm(len(rows), generator=generator)[:share]
        wanted = rows[positions]
        found[name][-1].append(_Call(positions, wanted[:, channels[name]] if name in channels else wanted))

    with ExitStack() as hooks:
        for name in order:
            layer = dense.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(lambda _m, _i, output, name=name: record(name, output)))
        for number, probe in enumerate(probes, start=1):
            for calls in found.values():
                calls.append([])
            run_stages(dense, probe)
            report(number)
    return found


def _collect(
    small: nn.Module, targets: dict[str, list[list[_Call]]], probes: Sequence[Probe], frontier: Frontier
) -> dict[str, tuple[NormalEquations, NormalEquations]]:
    """Of each layer its normal equations in two halves: its inputs in the small model, the dense layer's outputs."""
    halves = {}
    for name, calls in targets.items():
        empty = _inputs(small.get_submodule(name)), calls[0][0].wanted.shape[1]
        halves[name] = NormalEquations.empty(*empty), NormalEquations.empty(*empty)
    pending: dict[str, list[_Call]] = {}

    def take(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        call = pending[name].pop(0)
        patches = input_patches(layer, inputs[0], call.positions)
        if len(probes) > 1:
            halves[name][frontier.probe % 2].add(patches, call.wanted)
        else:
            halves[name][0].add(patches[::2], call.wanted[::2])
            halves[name][1].add(patches[1::2], call.wanted[1::2])
        if not any(pending.values()):
            raise _Reached

    with ExitStack() as hooks:
        for name in targets:
            layer = small.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(partial(take, name)))
        for frontier.probe, probe in enumerate(probes):
            pending = {name: list(calls[frontier.probe]) for name, calls in targets.items()}
            with suppress(_Reached):
                run_stages(small, probe)
    return halves


def _run_all(model: nn.Module, probes: Sequence[Probe], frontier: Frontier) -> None:
    for frontier.probe, probe in enumerate(probes):
        run_stages(model, probe)


def input_patches(layer: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """What a layer reads to compute its outputs at `positions`.

    Args:
        layer: convolution or decomposed layer with zero padding, or a linear layer.
        x: [N, I, H, W], or [N, F] for a linear layer.
        positions: int64 [P], indices into the flattened [N, H', W'] of the output.

    Returns:
        [P, I * Kh * Kw], or [P, F].
    """
    if isinstance(layer, nn.Linear):
        return x[positions]
    conv: Any = layer  # A Conv2d or a decomposed layer, which has the same geometry.
    (kernel_h, kernel_w), (stride_h, stride_w) = conv.kernel_size, conv.stride
    (pad_h, pad_w), (dilation_h, dilation_w) = conv.padding, conv.dilation
    height = (x.shape[2] + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    width = (x.shape[3] + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    padded = nn.functional.pad(x, (pad_w, pad_w, pad_h, pad_h))
    image, place = positions // (height * width), positions % (height * width)
    rows = (place // width * stride_h)[:, None, None] + dilation_h * torch.arange(kernel_h)[:, None]
    columns = (place % width * stride_w)[:, None, None] + dilation_w * torch.arange(kernel_w)
    patches = padded[image[:, None, None], :, rows, columns]  # [P, Kh, Kw, I]
    return torch.einsum("phwi->pihw", patches).flatten(1)


def _refit_layer(
    layer: nn.Module, prior: Tensor, halves: tuple[NormalEquations, NormalEquations], name: str, sweeps: int
) -> LayerRefit:
    """Solve one layer, taking only what is better, filter by filter where filters are independent.

    A fit on one half of the samples is tried on the other half with every ridge; if none helps there, too few
    samples were given for so many unknowns and the layer stays.
    """
    old = (layer.dense_weight() if isinstance(layer, Decomposed) else cast(Tensor, layer.weight)).detach().flatten(1)
    old_bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else None
    before = sum((half.squared_error(old, old_bias) for half in halves), old.new_zeros((), dtype=torch.float64))
    energy, error = float(sum(half.energy.sum() for half in halves)), float(before.sum())
    if energy == 0 or error <= EXACT * energy:
        return LayerRefit(name, 0.0, 0.0)
    ridge = _best_ridge(layer, prior, halves, old, old_bias)
    if ridge is None:
        return LayerRefit(name, error / energy, error / energy)
    equations = halves[0].merged(halves[1])
    del halves  # a wide layer's moments are large
    found = _solution(layer, prior, equations, old, ridge, sweeps)
    after = equations.squared_error(found.weight, found.bias)
    better = after < before
    if isinstance(found.factors, ChainKernels):
        better = (after.sum() < before.sum()).expand_as(better)
        if bool(better.any()):
            found.factors.load_into(cast(FactoredConv, layer))
    elif found.factors is not None:
        block = cast(CPDBlock, layer)
        present = block.factors()
        chosen = (
            torch.where(better[:, None, None], fresh, stale)
            for fresh, stale in (
                (found.factors.A, present.A),
                (found.factors.B, present.B),
                (found.factors.C, present.C),
            )
        )
        block.load_factors(CPFactors(*chosen))
    else:
        weight = cast(Tensor, layer.weight)
        weight.copy_(torch.where(better[:, None], found.weight, old).view_as(weight))
    if isinstance(layer.bias, Tensor) and old_bias is not None and found.bias is not None:
        layer.bias.copy_(torch.where(better, found.bias, old_bias))
    return LayerRefit(name, error / energy, float(torch.where(better, after, before).sum()) / energy)


def _best_ridge(
    layer: nn.Module,
    prior: Tensor,
    halves: tuple[NormalEquations, NormalEquations],
    old: Tensor,
    old_bias: Tensor | None,
) -> float | None:
    """The ridge whose fit on the first half has the least error on the second; None if the old weights have less."""
    fitted, held_out = halves
    if isinstance(layer, CPDBlock):
        filters = torch.arange(len(old))[:: -(-len(old) // TRIAL_FILTERS)]
        layer, (fitted, held_out) = layer.select_filters(filters), (half.of_outputs(filters) for half in halves)
        old, old_bias, prior = old[filters], None if old_bias is None else old_bias[filters], prior[filters]
    best, least = None, float(held_out.squared_error(old, old_bias).sum())
    for ridge in RIDGES:
        found = _solution(layer, prior, fitted, old, ridge, sweeps=1)
        error = float(held_out.squared_error(found.weight, found.bias).sum())
        if error < least:
            best, least = ridge, error
    return best


def _solution(
    layer: nn.Module, prior: Tensor, equations: NormalEquations, old: Tensor, ridge: float, sweeps: int
) -> _Solution:
    """The fit of a layer in its form."""
    has_bias = layer.bias is not None
    problem = equations.centred() if has_bias else equations
    factors: CPFactors | ChainKernels | None = None
    if isinstance(layer, CPDBlock):
        factors = fit_factors(problem, layer.factors(), sweeps, ridge)
        new = factors.reconstruct().flatten(1)
    elif isinstance(layer, FactoredConv):
        factors = fit_chain(problem.with_prior(prior, ridge), ChainKernels.of(layer), sweeps)
        new = factors.weight().flatten(1).float()
    else:
        new = problem.fit(old, ridge).float()
    return _Solution(new, equations.bias(new).float() if has_bias else None, factors)

"""Quick recovery without labels: each layer is refitted to give the dense layer's outputs from the inputs it now has.

Decomposition and pruning change what every later layer reads. In the order of the data, each layer of the small
model is solved again by least squares on sampled positions of unlabelled images: the wanted outputs are the dense
layer's, the inputs those that the small model computes with all earlier layers already refitted. A plain layer has
one closed form; a CPDBlock has one for each factor given the other two.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from norton_deploy.compression.calibration import Probe, run_stages
from norton_deploy.compression.channel_groups import channel_groups
from norton_deploy.compression.compress import Progress
from norton_deploy.compression.cpd_block import CPDBlock
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


class _Reached(Exception):  # noqa: N818 (ends a forward pass early, nothing went wrong)
    """The layer in question has been called for the last time."""


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
        sweeps: rounds over the factors of a CPDBlock.
        seed: of the choice of positions.
        progress: told of each layer.

    Returns:
        What happened to each layer, in order. The error on the sampled positions never rises: a filter whose
        error would is left as it was.
    """
    modes = small.training, dense.training
    small.eval(), dense.eval()
    channels = {
        producer: kept[name]
        for name, group in channel_groups(dense).items()
        if name in kept
        for producer in group.producers
    }
    order = _layers_in_order(small, probes[0])
    report = progress or (lambda name, layers: None)
    targets = _dense_outputs(dense, order, _budgets(small, order, samples), channels, probes, seed)
    results = []
    for name in order:
        halves = _collect(small, name, targets.pop(name), probes)
        results.append(_refit_layer(small.get_submodule(name), halves, name, sweeps))
        report(name, len(order))
    small.train(modes[0]), dense.train(modes[1])
    return results


def refittable_layers(model: nn.Module) -> list[str]:
    """Names of the layers that `refit` changes: CPDBlocks, linear layers and ungrouped convolutions."""
    inside = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, CPDBlock))
    return [name for name, layer in model.named_modules() if _is_refittable(layer) and not name.startswith(inside)]


def _is_refittable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear) or (isinstance(layer, CPDBlock) and not isinstance(layer.padding, str))


def _layers_in_order(model: nn.Module, probe: Probe) -> list[str]:
    """The refittable layers in the order in which they are first called."""
    order: dict[str, None] = {}
    with ExitStack() as hooks:
        for name in refittable_layers(model):
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(lambda _m, _i, name=name: order.setdefault(name)))
        run_stages(model, probe)
    return list(order)


def _inputs(layer: nn.Module) -> int:
    """Number of unknowns per filter of a plain layer, or of the convolution that a block stands for."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    conv = cast(nn.Conv2d, layer)  # Or a CPDBlock, which has the same geometry.
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
        for probe in probes:
            for calls in found.values():
                calls.append([])
            run_stages(dense, probe)
    return found


def _collect(
    small: nn.Module, name: str, targets: list[list[_Call]], probes: Sequence[Probe]
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of one layer, its inputs in the small model and the dense layer's outputs, in two halves."""
    layer = small.get_submodule(name)
    empty = _inputs(layer), targets[0][0].wanted.shape[1]
    halves = NormalEquations.empty(*empty), NormalEquations.empty(*empty)
    pending: list[_Call] = []

    def take(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        call = pending.pop(0)
        patches = input_patches(layer, inputs[0], call.positions)
        if len(probes) > 1:
            halves[index % 2].add(patches, call.wanted)
        else:
            halves[0].add(patches[::2], call.wanted[::2])
            halves[1].add(patches[1::2], call.wanted[1::2])
        if not pending:
            raise _Reached

    with layer.register_forward_pre_hook(take):
        for index, (probe, calls) in enumerate(zip(probes, targets, strict=True)):  # noqa: B007 (read by `take`)
            pending[:] = calls
            try:
                run_stages(small, probe)
            except _Reached:
                continue
    return halves


def input_patches(layer: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """What a layer reads to compute its outputs at `positions`.

    Args:
        layer: convolution or CPDBlock with zero padding, or a linear layer.
        x: [N, I, H, W], or [N, F] for a linear layer.
        positions: int64 [P], indices into the flattened [N, H', W'] of the output.

    Returns:
        [P, I * Kh * Kw], or [P, F].
    """
    if isinstance(layer, nn.Linear):
        return x[positions]
    conv: Any = layer  # A Conv2d or a CPDBlock, which has the same geometry.
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
    layer: nn.Module, halves: tuple[NormalEquations, NormalEquations], name: str, sweeps: int
) -> LayerRefit:
    """Solve one layer, filter by filter taking only what is better.

    A fit on one half of the samples is tried on the other half with every ridge; if none helps there, too few
    samples were given for so many unknowns and the layer stays.
    """
    equations = halves[0].merged(halves[1])
    weight = layer.dense_weight() if isinstance(layer, CPDBlock) else cast(Tensor, layer.weight)
    old = weight.detach().flatten(1)
    old_bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else None
    before = equations.squared_error(old, old_bias)
    energy = float(equations.energy.sum())
    if energy == 0 or float(before.sum()) <= EXACT * energy:
        return LayerRefit(name, 0.0, 0.0)
    ridge = _best_ridge(layer, halves, old, old_bias)
    if ridge is None:
        return LayerRefit(name, float(before.sum()) / energy, float(before.sum()) / energy)
    factors = layer.factors() if isinstance(layer, CPDBlock) else None
    new, new_bias, factors = _solution(equations, old, old_bias is not None, factors, ridge, sweeps)
    after = equations.squared_error(new, new_bias)
    better = after < before
    if isinstance(layer, CPDBlock) and factors is not None:
        present = layer.factors()
        chosen = (
            torch.where(better[:, None, None], fresh, stale)
            for fresh, stale in ((factors.A, present.A), (factors.B, present.B), (factors.C, present.C))
        )
        layer.load_factors(CPFactors(*chosen))
    else:
        weight.copy_(torch.where(better[:, None], new, old).view_as(weight))
    if isinstance(layer.bias, Tensor) and old_bias is not None and new_bias is not None:
        layer.bias.copy_(torch.where(better, new_bias, old_bias))
    return LayerRefit(name, float(before.sum()) / energy, float(torch.minimum(before, after).sum()) / energy)


def _best_ridge(
    layer: nn.Module, halves: tuple[NormalEquations, NormalEquations], old: Tensor, old_bias: Tensor | None
) -> float | None:
    """The ridge whose fit on the first half has the least error on the second; None if the old weights have less."""
    filters, factors = torch.arange(len(old)), None
    if isinstance(layer, CPDBlock):
        filters = filters[:: -(-len(old) // TRIAL_FILTERS)]
        factors = layer.factors().select_filters(filters)
    fitted, held_out = (half.of_outputs(filters) for half in halves)
    bias = None if old_bias is None else old_bias[filters]
    best, least = None, float(held_out.squared_error(old[filters], bias).sum())
    for ridge in RIDGES:
        weight, new_bias, _ = _solution(fitted, old[filters], bias is not None, factors, ridge, 1)
        error = float(held_out.squared_error(weight, new_bias).sum())
        if error < least:
            best, least = ridge, error
    return best


def _solution(
    equations: NormalEquations, old: Tensor, has_bias: bool, factors: CPFactors | None, ridge: float, sweeps: int
) -> tuple[Tensor, Tensor | None, CPFactors | None]:
    """Fitted weights [O, F], bias [O] if there is one, and a CPDBlock's factors, from its present ones."""
    problem = equations.centred() if has_bias else equations
    if factors is not None:
        factors = fit_factors(problem, factors, sweeps, ridge)
        new = factors.reconstruct().flatten(1)
    else:
        new = problem.fit(old, ridge).float()
    return new, equations.bias(new).float() if has_bias else None, factors

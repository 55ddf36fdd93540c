"""One pass over a model before export: CPDBlocks to the form they run in, BatchNorm into the convolutions."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

from torch import nn

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.lowering import Form, Norm, fold_norm, lower_block
from norton_deploy.errors import UserError

M = TypeVar("M", bound=nn.Module)
MOVED_CHANNEL_COST = 300
"""What a channel costs on its way through a block's two depthwise convolutions and the sum, which move memory rather
than compute: as much as so many input channels of the pointwise convolution. Chosen on a CPU; how well it chooses is in
benchmarks/results/training_forms.md."""


def lower_model(model: M, form: Form = "grouped", forms: Mapping[str, Form] | None = None) -> M:
    """A copy of `model` in which every CPDBlock has its running form and BatchNorm is folded away.

    Args:
        model: in eval mode; any module that holds its layers as torchvision does, a normalisation directly
            after the convolution whose output it takes: `convN`, `bnN` in a ResNet, neighbours in an
            `nn.Sequential`.
        form: how CPDBlocks leave, see `norton_deploy.compression.lowering`.
        forms: name of a CPDBlock in `model` -> its own form, for those that shall not take `form`.

    Returns:
        A copy with the same outputs to rounding; GroupNorm and other normalisations stay.

    Raises:
        UserError: the model is in training mode, where BatchNorm is no fixed affine map; a BatchNorm keeps no
            statistics; or a name in `forms` is no CPDBlock.
    """
    if model.training:
        raise UserError("lower_model: the model is in training mode; call .eval() first")
    chosen = dict(forms or {})
    blocks = {name for name, module in model.named_modules() if isinstance(module, CPDBlock)}
    for name in chosen:
        if name not in blocks:
            raise UserError(f"lower_model: '{name}' is not a CPDBlock of this model")
    lowered = copy.deepcopy(model)
    for path, parent in list(lowered.named_modules()):
        if not isinstance(parent, CPDBlock):
            _lower_children(parent, f"{path}." if path else "", form, chosen)
    return lowered.eval()


def quickest_forms(model: nn.Module) -> dict[str, Form]:
    """Name of every CPDBlock -> the form that should run quickest in PyTorch, by its rank and width; not measured."""
    return {
        name: "dense" if is_quicker_dense(block) else "grouped"
        for name, block in model.named_modules()
        if isinstance(block, CPDBlock)
    }


def is_quicker_dense(block: CPDBlock) -> bool:
    """Whether one convolution with a block's `dense_weight` should take less time on a CPU than the block's three.

    So it is at high ranks, where R * O channels pass through the block.
    """
    kernel_h, kernel_w = block.kernel_size
    return block.rank * (block.in_channels + MOVED_CHANNEL_COST) > block.in_channels * kernel_h * kernel_w


def _lower_children(parent: nn.Module, prefix: str, form: Form, forms: Mapping[str, Form]) -> None:
    """Replace, in place, the direct children of `parent` that are blocks or convolutions with a BatchNorm."""
    children: list[tuple[str, nn.Module | None]] = [*parent.named_children(), ("", None)]
    for (name, layer), (next_name, next_layer) in pairwise(children):
        norm = next_layer if isinstance(next_layer, Norm) and _follows(parent, name, next_name) else None
        if isinstance(layer, CPDBlock):
            setattr(parent, name, lower_block(layer, norm, forms.get(prefix + name, form)))
        elif isinstance(layer, nn.Conv2d) and norm is not None:
            setattr(parent, name, fold_norm(layer, norm))
        else:
            continue
        if norm is not None:
            setattr(parent, next_name, nn.Identity())


def _follows(parent: nn.Module, name: str, next_name: str) -> bool:
    """Whether child `next_name` of `parent` is known to take the output of its neighbour `name`."""
    return isinstance(parent, nn.Sequential) or next_name == name.replace("conv", "bn")

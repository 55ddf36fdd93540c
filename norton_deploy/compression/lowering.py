"""Exact forms of decomposed layers, as ordinary convolutions with normalisation and bias folded in, for running."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.factored_conv import Decomposed, FactoredConv
from norton_deploy.errors import UserError

Form = Literal["separable", "grouped", "dense"]
FoldableNorm: TypeAlias = nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d
M = TypeVar("M", bound=nn.Module)
MOVED_CHANNEL_COST = 300
"""What a channel costs on its way through a block's two depthwise convolutions and the sum, which move memory rather
than compute: as much as so many input channels of the pointwise convolution. Chosen on a CPU; how well it chooses is in
benchmarks/results/training_forms.md."""


def lower_block(block: CPDBlock, norm: FoldableNorm | None = None, form: Form = "grouped") -> nn.Sequential | nn.Conv2d:
    """The convolutions that compute norm(block(x)) in evaluation mode.

    - separable: pointwise I -> R*O, depthwise 1 x Kw, then Kh x 1 with groups=O and R inputs per group, which
      sums over r inside the convolution (eq. 4-7): R*O*(I + Kh + Kw) multiplications per pixel at stride 1.
    - grouped: pointwise I -> R*O, then one Kh x Kw convolution with groups=O and R inputs per group, kernel
      A_k outer B_k for each r: two layers instead of three, R*O*(I + Kh*Kw).
    - dense: one convolution with the recomposed filters (eq. 2): O*I*Kh*Kw.

    Args:
        block: on any device; it is not changed.
        norm: the BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d that follows the block; its running statistics
            are used whatever its mode.

    Returns:
        A new module in evaluation mode, on the block's device and in its dtype, without gradient: a Sequential
        of Conv2d, or for "dense" one Conv2d.

    Raises:
        UserError: an unknown form, or a norm without running statistics or of another kind.
    """
    if form not in ("separable", "grouped", "dense"):
        raise UserError(f"form {form!r}: expected 'separable', 'grouped' or 'dense'")
    with torch.no_grad():
        factors = block.factors()
        A, B, C = factors.A.double(), factors.B.double(), factors.C.double()
        scale, shift = _affine(block.out_channels, block.bias, norm)
        if form == "dense":
            return _conv(block, _scaled(torch.einsum("ohr,owr,oir->oihw", A, B, C), scale), shift)
        pointwise = _conv(block.pointwise, C.mT.flatten(0, 1)[:, :, None, None])
        if form == "grouped":
            kernels = _scaled(torch.einsum("ohr,owr->orhw", A, B), scale)
            return nn.Sequential(pointwise, _conv(block, kernels, shift, block.out_channels)).eval()
        rows = B.mT.flatten(0, 1)[:, None, None, :]
        horizontal = _conv(block.horizontal, rows, groups=block.rank * block.out_channels)
        vertical = _conv(block.vertical, _scaled(A.mT[..., None], scale), shift, block.out_channels)
        return nn.Sequential(pointwise, horizontal, vertical).eval()


def multiply_out(model: M) -> M:
    """A copy of `model` with one ordinary convolution for each decomposed layer; normalisations stay as they are."""
    dense = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, CPDBlock):
            dense.set_submodule(name, lower_block(layer, form="dense"))
        elif isinstance(layer, FactoredConv):
            dense.set_submodule(name, lower_chain(layer, form="dense"))
    return dense


def lower_chain(
    chain: FactoredConv, norm: FoldableNorm | None = None, form: Form = "grouped"
) -> nn.Sequential | nn.Conv2d:
    """The convolutions of a chain, `norm` folded into the last one: norm(chain(x)) in evaluation mode. For "dense" the
    one convolution that they equal.

    Raises:
        UserError: a norm without running statistics or of a kind that cannot be folded.
    """
    if form == "dense":
        with torch.no_grad():
            scale, shift = _affine(chain.out_channels, chain.bias, norm)
            return _conv(chain.middle, _scaled(chain.dense_weight().double(), scale), shift)
    parts = [part for part in (chain.entry, chain.middle, chain.exit) if part is not None]
    convolutions = [copy.deepcopy(part).requires_grad_(False) for part in parts[:-1]]
    last = copy.deepcopy(chain.last).requires_grad_(False) if norm is None else fold_norm(chain.last, norm)
    return nn.Sequential(*convolutions, last).eval()


def fold_norm(conv: nn.Conv2d, norm: FoldableNorm) -> nn.Conv2d:
    """The convolution that computes norm(conv(x)) in evaluation mode; a new module with a bias, no gradient.

    Raises:
        UserError: a norm without running statistics or of a kind that cannot be folded.
    """
    with torch.no_grad():
        scale, shift = _affine(conv.out_channels, conv.bias, norm)
        return _conv(conv, _scaled(conv.weight.double(), scale), shift, conv.groups)


def _affine(channels: int, bias: Tensor | None, norm: FoldableNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """norm(y + bias) = scale * y + shift per channel, float64 [O]; None where there is nothing to apply."""
    if norm is None:
        return None, None if bias is None else bias.double()
    if not isinstance(norm, FoldableNorm):
        raise UserError(f"a {type(norm).__name__} cannot be folded: expected BatchNorm2d or FrozenBatchNorm2d")
    if norm.running_mean is None or norm.running_var is None:
        raise UserError("a BatchNorm without running statistics cannot be folded: it needs the batch it sees")
    if len(norm.running_mean) != channels:
        raise ValueError(f"a norm of {len(norm.running_mean)} channels after {channels} filters")
    mean = norm.running_mean.double()
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = scale * (-mean if bias is None else bias.double() - mean)
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Kernels [O, ...] times one number per filter."""
    return weight if scale is None else weight * scale.view(-1, *[1] * (weight.ndim - 1))


def _conv(like: nn.Conv2d | CPDBlock, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> nn.Conv2d:
    """A Conv2d with these numbers, and the stride, padding, dilation, dtype and device of `like`."""
    own = like.weight if isinstance(like, nn.Conv2d) else like.pointwise.weight
    conv = nn.utils.skip_init(
        nn.Conv2d, weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]),
        stride=like.stride, padding=like.padding, dilation=like.dilation, groups=groups, bias=bias is not None,
        padding_mode=like.padding_mode if isinstance(like, nn.Conv2d) else "zeros", device=own.device, dtype=own.dtype,
    )  # fmt: skip
    conv.weight.copy_(weight)
    if bias is not None:
        conv.bias.copy_(bias)
    return conv.requires_grad_(False).eval()


def lower_model(model: M, form: Form = "grouped", forms: Mapping[str, Form] | None = None) -> M:
    """A copy of `model` in which every decomposed layer has its running form and BatchNorm is folded away.

    Args:
        model: in eval mode; any module that holds its layers as torchvision does, a normalisation directly
            after the convolution whose output it takes: `convN`, `bnN` in a ResNet, neighbours in an
            `nn.Sequential`.
        form: of the decomposed layers; "separable" and "grouped" differ for CPDBlocks only.
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
        if not isinstance(parent, Decomposed):
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
        norm = next_layer if isinstance(next_layer, FoldableNorm) and _follows(parent, name, next_name) else None
        if isinstance(layer, CPDBlock):
            setattr(parent, name, lower_block(layer, norm, forms.get(prefix + name, form)))
        elif isinstance(layer, FactoredConv):
            setattr(parent, name, lower_chain(layer, norm, form))
        elif isinstance(layer, nn.Conv2d) and norm is not None:
            setattr(parent, name, fold_norm(layer, norm))
        else:
            continue
        if norm is not None:
            setattr(parent, next_name, nn.Identity())


def _follows(parent: nn.Module, name: str, next_name: str) -> bool:
    """Whether child `next_name` of `parent` is known to take the output of its neighbour `name`."""
    return isinstance(parent, nn.Sequential) or next_name == name.replace("conv", "bn")

"""Exact forms of a CPDBlock as ordinary convolutions, for running it, with normalisation and bias folded in."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.cpd_block import CPDBlock, Padding, Pair
from norton_deploy.errors import UserError

Form = Literal["separable", "grouped", "dense"]
FoldableNorm: TypeAlias = nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d


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
        form: which of the three.

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
            weight = torch.einsum("ohr,owr,oir->oihw", A, B, C)
            return _conv(block, _scaled(weight, scale), shift, block.stride, block.padding, block.dilation)

        pointwise = _conv(block, C.mT.flatten(0, 1)[:, :, None, None], None)
        if form == "grouped":
            weight = torch.einsum("ohr,owr->orhw", A, B)
            grouped = _conv(
                block,
                _scaled(weight, scale),
                shift,
                block.stride,
                block.padding,
                block.dilation,
                groups=block.out_channels,
            )
            return nn.Sequential(pointwise, grouped).eval()

        row: Padding = "same" if block.padding == "same" else (0, block.padding[1])
        column: Padding = "same" if block.padding == "same" else (block.padding[0], 0)
        horizontal = _conv(
            block,
            B.mT.flatten(0, 1)[:, None, None, :],
            None,
            (1, block.stride[1]),
            row,
            (1, block.dilation[1]),
            groups=block.rank * block.out_channels,
        )
        vertical = _conv(
            block,
            _scaled(A.mT[..., None], scale),
            shift,
            (block.stride[0], 1),
            column,
            (block.dilation[0], 1),
            groups=block.out_channels,
        )
        return nn.Sequential(pointwise, horizontal, vertical).eval()


def fold_norm(conv: nn.Conv2d, norm: FoldableNorm) -> nn.Conv2d:
    """The convolution that computes norm(conv(x)) in evaluation mode; a new module with a bias, no gradient.

    Raises:
        UserError: a norm without running statistics or of a kind that cannot be folded.
    """
    with torch.no_grad():
        scale, shift = _affine(conv.out_channels, conv.bias, norm)
        folded = nn.utils.skip_init(
            nn.Conv2d,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        folded.weight.copy_(_scaled(conv.weight.double(), scale))
        folded.bias.copy_(shift)
    return folded.requires_grad_(False).eval()


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


def _conv(
    block: CPDBlock,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> nn.Conv2d:
    """A Conv2d with these numbers, in the dtype and on the device of the block."""
    like = block.pointwise.weight
    conv = nn.utils.skip_init(
        nn.Conv2d,
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias is not None,
        device=like.device,
        dtype=like.dtype,
    )
    conv.weight.copy_(weight)
    if bias is not None:
        conv.bias.copy_(bias)
    return conv.requires_grad_(False).eval()

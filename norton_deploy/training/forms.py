"""The forms in which layers train quickest: the same functions of the same Parameters, computed otherwise.

A pass over a model puts other layers in place of its CPDBlocks (`recompose_blocks`, for GPUs, which are slow at
depthwise convolutions), and of its plain 3 x 3 convolutions too (`use_cpu_forms`); names, state and gradients stay.
When a block trains as one convolution on a CPU is chosen by the constants below, from its shape and the precision; how
well is in benchmarks/results/training_forms.md.

oneDNN's bfloat16 convolutions are slow where a map has 4 x 4 or 2 x 2 positions, as in the last six convolutions of
VGG-16 at 32 x 32. The same sums written as one product over all positions of all images are not; see
benchmarks/results/training_forms.md.
"""

from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.lowering import is_quicker_dense

LARGEST_MAP = 16
"""Positions of the largest map that is a matrix product; from 8 x 8 on oneDNN's own convolutions are quicker."""
MOVED_CHANNEL_COST_BFLOAT16 = 900
"""As `lowering.MOVED_CHANNEL_COST`, in bfloat16 on a CPU with AMX, where products are cheaper and memory is not."""
RECOMPOSED_WEIGHT_COST_BFLOAT16 = 540
"""What recomposing a weight and its gradient costs there: as much as a convolution with it at so many positions."""

M = TypeVar("M", bound=nn.Module)


class RecomposedBlock(CPDBlock):
    """A CPDBlock that runs as the one convolution that it equals (eq. 2)."""

    @classmethod
    def sharing(cls, block: CPDBlock) -> Self:
        """One with the very layers and bias of `block`."""
        twin = cls(
            block.in_channels,
            block.out_channels,
            block.kernel_size,
            block.rank,
            block.stride,
            block.padding,
            block.dilation,
            device="meta",
        )
        twin.pointwise, twin.horizontal, twin.vertical = block.pointwise, block.horizontal, block.vertical
        twin.bias = block.bias
        return twin.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W']."""
        with torch.autocast(x.device.type, enabled=False):  # sums over the factors in float32
            weight = self.dense_weight()
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class CpuBlock(RecomposedBlock):
    """A CPDBlock that trains as one convolution where that should take less time on a CPU."""

    def trains_as_one(self, x: Tensor) -> bool:
        """By rank and width; in bfloat16, where the recomposed weight is dear, also by the number of positions."""
        if not is_bfloat16_on_cpu(x):
            return is_quicker_dense(self)
        kernel_h, kernel_w = self.kernel_size
        positions = x.shape[0] * x.shape[2] * x.shape[3]
        three = self.rank * (self.in_channels + MOVED_CHANNEL_COST_BFLOAT16) * positions
        one = self.in_channels * kernel_h * kernel_w * (positions + RECOMPOSED_WEIGHT_COST_BFLOAT16)
        return three > one

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W'], in evaluation by eq. 4-7."""
        if self.training and self.trains_as_one(x):
            return convolve(x, self.dense_weight(), self.bias, self.stride, self.padding, self.dilation)
        return CPDBlock.forward(self, x)


class SmallMapConv2d(nn.Conv2d):
    """A 3 x 3 convolution (stride 1, padding 1) that is a matrix product over small maps under bfloat16 autocast.

    Results are those of `nn.Conv2d`, up to bfloat16's rounding; anywhere else it is one.
    """

    @classmethod
    def sharing(cls, conv: nn.Conv2d) -> "SmallMapConv2d":
        """One with the very weight and bias of a plain 3 x 3 convolution."""
        twin = cls(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        twin.weight, twin.bias = conv.weight, conv.bias
        return twin.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H, W]."""
        return convolve(input, self.weight, self.bias, self.stride, self.padding, self.dilation)


def recompose_blocks(model: M) -> M:
    """Have every CPDBlock run as one convolution, in place.

    Returns:
        `model`, with the same Parameters under the same names; the blocks that hold them are new.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CPDBlock):
            model.set_submodule(name, RecomposedBlock.sharing(layer))
    return model


def use_cpu_forms(model: M) -> M:
    """Give CPDBlocks and plain 3 x 3 convolutions the forms that train quickest on a CPU, in place.

    Returns:
        `model`, with the same Parameters; the layers that hold them are new.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CPDBlock):
            model.set_submodule(name, CpuBlock.sharing(layer))
        elif type(layer) is nn.Conv2d and _is_plain(layer):
            model.set_submodule(name, SmallMapConv2d.sharing(layer))
    return model


def convolve(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """`functional.conv2d` without groups, as a matrix product where that is quicker.

    Args:
        images: [N, C, H, W].
        weight: [O, C, Kh, Kw].
        bias: [O], or None.

    Returns:
        [N, O, H', W'].
    """
    plain = weight.shape[2:] == (3, 3) and stride == padding == dilation == (1, 1)
    small = images.shape[2] * images.shape[3] <= LARGEST_MAP
    if not (plain and small and is_bfloat16_on_cpu(images)):
        return functional.conv2d(images, weight, bias, stride, padding, dilation)
    output: Tensor = _ProductConvolution.apply(images, weight)
    return output if bias is None else output + bias.to(output.dtype)[:, None, None]


def is_bfloat16_on_cpu(images: Tensor) -> bool:
    """Whether a convolution of these images computes in bfloat16 on a CPU, by autocast."""
    on_cpu = images.device.type == "cpu"
    return on_cpu and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


class _ProductConvolution(torch.autograd.Function):
    """Y = P(X) W and its two gradients P(X)^T dY and P(dY) W', P gathering the 3 x 3 neighbourhood of each position."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        patches = _neighbourhoods(images)
        kernel = weight.detach().to(torch.bfloat16)
        ctx.save_for_backward(patches, kernel)
        ctx.types = images.dtype, weight.dtype
        return _as_maps(patches @ kernel.permute(2, 3, 1, 0).reshape(-1, kernel.shape[0]), images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        patches, kernel = ctx.saved_tensors
        outputs, inputs = kernel.shape[:2]
        by_position = gradient.to(torch.bfloat16).permute(0, 2, 3, 1).reshape(-1, outputs)
        of_weight = (by_position.t() @ patches).view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)
        turned = kernel.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, inputs)
        of_images = _as_maps(_neighbourhoods(gradient) @ turned, gradient)
        return of_images.to(ctx.types[0]), of_weight.to(ctx.types[1])


def _neighbourhoods(maps: Tensor) -> Tensor:
    """[N, C, H, W] -> [N H W, 9 C] in bfloat16: row by row of each neighbourhood, zeros beyond the edge."""
    images, channels, height, width = maps.shape
    padded = functional.pad(maps.to(torch.bfloat16).permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.cat(shifted, dim=-1).view(images * height * width, 9 * channels)


def _as_maps(rows: Tensor, like: Tensor) -> Tensor:
    """[N H W, C] -> [N, C, H, W], channels last in memory."""
    images, _, height, width = like.shape
    return rows.view(images, height, width, -1).permute(0, 3, 1, 2)


def _is_plain(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.padding == convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )

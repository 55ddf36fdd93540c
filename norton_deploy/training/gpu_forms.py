"""Forms in which a network trains fast on a GPU: the same functions of the same Parameters, computed otherwise."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from norton_deploy.compression.cpd_block import CPDBlock

M = TypeVar("M", bound=nn.Module)


class RecomposedBlock(CPDBlock):
    """A CPDBlock that runs as the one convolution that it equals (eq. 2), since GPUs are slow at depthwise ones."""

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


def recompose_blocks(model: M) -> M:
    """Have every CPDBlock run as one convolution, in place.

    Returns:
        `model`, with the same Parameters under the same names; the blocks that hold them are new.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CPDBlock):
            model.set_submodule(name, RecomposedBlock.sharing(layer))
    return model


@torch.no_grad()
def use_gpu_forms(model: M) -> M:
    """Recompose all CPDBlocks and move biases that a BatchNorm follows into its mean, in place; returns the model.

    Such a bias changes nothing in training but costs a pass over the maps there and one back.
    """
    recompose_blocks(model)
    for layer, norm in _normalised_layers(model):
        if isinstance(layer.bias, Tensor):
            cast(Tensor, norm.running_mean).sub_(layer.bias)
            layer.register_parameter("bias", None)
    return model.to(memory_format=torch.channels_last)


def _normalised_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Layers with weights and the BatchNorm right behind them, in the Sequentials of a model."""
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            for layer, norm in pairwise(parent):
                if isinstance(layer, nn.Conv2d | nn.Linear | CPDBlock) and isinstance(
                    norm, nn.modules.batchnorm._BatchNorm
                ):
                    yield layer, norm

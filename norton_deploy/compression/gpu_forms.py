"""Forms in which a network trains fast on a GPU; they compute what it computes and have its parameters' names."""

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from norton_deploy.compression.cpd_block import CPDBlock


class RecomposedBlock(CPDBlock):
    """A CPDBlock that always runs as the one convolution that it equals, since GPUs are slow at depthwise ones."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W']."""
        with torch.autocast(x.device.type, enabled=False):  # sums over the factors in float32
            weight = self.dense_weight()
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


@torch.no_grad()
def use_gpu_forms(model: nn.Module) -> nn.Module:
    """Recompose all CPDBlocks and move biases that a BatchNorm follows into its mean, in place; returns the model.

    Such a bias changes nothing in training but costs a pass over the maps there and one back.
    """
    for block in model.modules():
        if type(block) is CPDBlock:
            block.__class__ = RecomposedBlock
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

"""FactoredConv: a convolution whose filters share factors, as a chain of two or three ordinary convolutions.

| form | entry | middle | exit |
|---|---|---|---|
| coupled, G clusters of rank R | 1x1, I -> G*R | Kh x Kw, G groups of R inputs, -> O | none |
| Tucker-2 of ranks R1, R2 | 1x1, I -> R1 | Kh x Kw, R1 -> R2 | 1x1, R2 -> O |
| layer CPD of rank R | 1x1, I -> R | Kh x Kw, each channel its own | 1x1, R -> O |

`CPDBlock` has the paper's own form, in which no factor is shared.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from norton_deploy.compression.cpd_block import CPDBlock, Padding, Pair, check_decomposable
from norton_deploy.method.coupled import CoupledFactors
from norton_deploy.method.layer_factors import ReshapedCP, Tucker2


@dataclass(frozen=True)
class ChainShape:
    """Widths of a chain.

    Attributes:
        first, last: channels before and after the middle convolution.
        has_exit: whether a 1x1 convolution follows; without one `last` is the number of filters.
    """

    first: int
    last: int
    groups: int = 1
    has_exit: bool = True


class FactoredConv(nn.Module):
    """A chain that stands for one ungrouped convolution.

    Attributes:
        entry: Conv2d I -> first, 1x1, without bias.
        middle: Conv2d first -> last, Kh x Kw, with the stride, padding and dilation of the convolution.
        exit: Conv2d last -> O, 1x1, or None. The last of the three has the bias.
    """

    def __init__(self, entry: nn.Conv2d, middle: nn.Conv2d, exit: nn.Conv2d | None = None) -> None:
        super().__init__()
        self.entry, self.middle, self.exit = entry, middle, exit

    @classmethod
    def shaped_like(
        cls, like: "nn.Conv2d | FactoredConv", shape: ChainShape, in_channels: int, out_channels: int
    ) -> "FactoredConv":
        """A chain with meaningless weights: geometry, dtype, device and mode of `like`, and a bias if that has one.

        Raises:
            UserError: groups != 1, or padding other than zeros.
        """
        if isinstance(like, nn.Conv2d):
            check_decomposable(like)
        own = like.weight if isinstance(like, nn.Conv2d) else like.middle.weight
        has_bias = like.bias is not None
        factory: dict[str, Any] = {"device": own.device, "dtype": own.dtype}
        geometry: Any = like
        middle = nn.Conv2d(
            shape.first, shape.last, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation,
            shape.groups,
            bias=has_bias and not shape.has_exit, **factory,
        )  # fmt: skip
        exit = nn.Conv2d(shape.last, out_channels, 1, bias=has_bias, **factory) if shape.has_exit else None
        entry = nn.Conv2d(in_channels, shape.first, 1, bias=False, **factory)
        return cls(entry, middle, exit).train(like.training)

    @classmethod
    def from_factors(cls, factors: CoupledFactors | Tucker2 | ReshapedCP, conv: nn.Conv2d) -> "FactoredConv":
        """The chain with these factors, and the geometry, bias, dtype and mode of `conv`.

        The filters of coupled factors are in the order of their clusters: the caller sorts them.

        Raises:
            UserError: groups != 1, or padding other than zeros.
        """
        if isinstance(factors, CoupledFactors):
            clusters, _, rank = factors.channels.shape
            if not torch.equal(factors.order, torch.arange(len(factors.cluster), device=factors.cluster.device)):
                raise ValueError("filters that are not sorted by cluster")
            shape = ChainShape(clusters * rank, len(factors.kernels), clusters, has_exit=False)
            entry, middle = factors.channels.mT.flatten(0, 1), factors.kernels
        elif isinstance(factors, Tucker2):
            shape = ChainShape(factors.core.shape[1], factors.core.shape[0])
            entry, middle = factors.input.mT, factors.core
        else:
            rank = factors.input.shape[1]
            shape = ChainShape(rank, rank, rank)
            entry, middle = factors.input.mT, torch.einsum("hwr->rhw", factors.spatial)[:, None]
        chain = cls.shaped_like(conv, shape, conv.in_channels, conv.out_channels)
        with torch.no_grad():
            chain.entry.weight.copy_(entry[:, :, None, None])
            chain.middle.weight.copy_(middle)
            if chain.exit is not None and not isinstance(factors, CoupledFactors):
                chain.exit.weight.copy_(factors.output[:, :, None, None])
            if chain.bias is not None and conv.bias is not None:
                chain.bias.copy_(conv.bias)
        return chain

    @property
    def shape(self) -> ChainShape:
        """The chain's widths."""
        return ChainShape(
            self.middle.in_channels, self.middle.out_channels, self.middle.groups, has_exit=self.exit is not None
        )

    @property
    def in_channels(self) -> int:
        """I."""
        return self.entry.in_channels

    @property
    def out_channels(self) -> int:
        """O."""
        return self.last.out_channels

    @property
    def last(self) -> nn.Conv2d:
        """The convolution that writes the filters' outputs."""
        return self.middle if self.exit is None else self.exit

    @property
    def bias(self) -> Tensor | None:
        """[O], or None."""
        return self.last.bias

    @property
    def clusters(self) -> int:
        """Clusters of equal size that the filters are in, one after the other; 1 if they are free."""
        return self.middle.groups if self.exit is None else 1

    @property
    def kernel_size(self) -> Pair:
        """(vertical, horizontal), of the convolution that the chain stands for; likewise the three below."""
        return self.middle.kernel_size[0], self.middle.kernel_size[1]

    @property
    def stride(self) -> Pair:
        """Of the convolution."""
        return self.middle.stride[0], self.middle.stride[1]

    @property
    def padding(self) -> Padding:
        """Zeros added (top and bottom, left and right), or "same"."""
        padding: Any = self.middle.padding
        return padding

    @property
    def dilation(self) -> Pair:
        """Of the convolution."""
        return self.middle.dilation[0], self.middle.dilation[1]

    def dense_weight(self) -> Tensor:
        """The weight [O, I, Kh, Kw] of the one convolution that the chain equals; differentiable."""
        return chain_weight(
            self.entry.weight, self.middle.weight, None if self.exit is None else self.exit.weight, self.middle.groups
        )

    def select_filters(self, index: Tensor) -> "FactoredConv":
        """A new chain with the output filters `index` [O'] only; of each cluster equally many, cluster by cluster.

        Raises:
            ValueError: the clusters would not be equally large, or mixed.
        """
        shape = self.shape
        if self.exit is None:
            cluster = index.to(self.middle.weight.device) // (self.out_channels // self.clusters)
            wanted = torch.arange(self.clusters, device=cluster.device).repeat_interleave(len(index) // self.clusters)
            if not torch.equal(cluster, wanted):
                raise ValueError(f"{len(index)} filters that are not equally many of each of {self.clusters} clusters")
            shape = ChainShape(shape.first, len(index), shape.groups, has_exit=False)
        small = FactoredConv.shaped_like(self, shape, self.in_channels, len(index))
        with torch.no_grad():
            small.entry.weight.copy_(self.entry.weight)
            small.middle.weight.copy_(self.middle.weight[index] if self.exit is None else self.middle.weight)
            if small.exit is not None and self.exit is not None:
                small.exit.weight.copy_(self.exit.weight[index])
            if small.bias is not None and self.bias is not None:
                small.bias.copy_(self.bias[index])
        return small

    def select_inputs(self, index: Tensor) -> "FactoredConv":
        """A new chain with the input channels `index` [I'] only."""
        small = FactoredConv.shaped_like(self, self.shape, len(index), self.out_channels)
        with torch.no_grad():
            small.entry.weight.copy_(self.entry.weight[:, index])
            for name, part in self.named_parameters():
                if name != "entry.weight":
                    small.get_parameter(name).copy_(part)
        return small

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W']."""
        y: Tensor = self.middle(self.entry(x))
        return y if self.exit is None else self.exit(y)


Decomposed = CPDBlock | FactoredConv
"""A layer in place of one convolution, that its plan decomposed."""


def chain_weight(entry: Tensor, middle: Tensor, exit: Tensor | None, groups: int) -> Tensor:
    """The weight [O, I, Kh, Kw] of a chain of kernels [F, I, 1, 1], [L, F / groups, Kh, Kw] and [O, L, 1, 1]."""
    kernels = middle.unflatten(0, (groups, -1))
    weight = torch.einsum("glfhw,gfi->glihw", kernels, entry.flatten(1).unflatten(0, (groups, -1))).flatten(0, 1)
    return weight if exit is None else torch.einsum("ol,lihw->oihw", exit.flatten(1), weight)

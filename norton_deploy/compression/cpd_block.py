"""CPDBlock: a convolution whose filters are CP decompositions (section II-A, eq. 4-7, Fig. 4)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from norton_deploy.errors import UserError
from norton_deploy.method.cp import CPFactors, max_rank

Pair = tuple[int, int]
Padding = Pair | Literal["same"]


class CPDBlock(nn.Module):
    """Pointwise convolution to R*O channels, a row and a column convolution per channel, the sum over r.

    Channel o * R + r of the three convolutions belongs to term r of filter o. R*O*(I + Kh + Kw) parameters, and O
    more with a bias.

    Attributes:
        in_channels, out_channels, rank: I, O and R.
        kernel_size, stride, dilation: (vertical, horizontal), those of the convolution it stands for.
        padding: zeros added (top and bottom, left and right), or "same" where that is not symmetric.
        pointwise: Conv2d I -> R*O, 1x1, holds C (eq. 4).
        horizontal: Conv2d 1 x Kw, one kernel per channel, holds B (eq. 5).
        vertical: Conv2d Kh x 1, one kernel per channel, holds A (eq. 6).
        bias: [O], or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Kernels start as nn.Conv2d's do; build on device="meta" for the structure alone.

        Raises:
            UserError: the kernel is 1x1 or the rank is above eq. 8.
        """
        super().__init__()
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.kernel_size = kernel_h, kernel_w = _pair(kernel_size)
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = _resolve_padding(padding, self.kernel_size, self.dilation)
        limit = max_rank(in_channels, kernel_h, kernel_w)
        if kernel_h * kernel_w < 2 or not 1 <= rank <= limit:
            raise UserError(
                f"no CPDBlock of rank {rank} for {in_channels} input channels and a {kernel_h}x{kernel_w} kernel: "
                + (f"choose rank 1 to {limit} (eq. 8)" if kernel_h * kernel_w > 1 else "prune a 1x1 convolution")
            )
        width = rank * out_channels
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        row: Padding = "same" if self.padding == "same" else (0, self.padding[1])
        column: Padding = "same" if self.padding == "same" else (self.padding[0], 0)
        self.pointwise = nn.Conv2d(in_channels, width, 1, **factory)
        self.horizontal = nn.Conv2d(
            width, width, (1, kernel_w), stride=(1, self.stride[1]), padding=row, dilation=(1, self.dilation[1]),
            groups=width, **factory,
        )  # fmt: skip
        self.vertical = nn.Conv2d(
            width, width, (kernel_h, 1), stride=(self.stride[0], 1), padding=column, dilation=(self.dilation[0], 1),
            groups=width, **factory,
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    @classmethod
    def shaped_like(cls, like: "nn.Conv2d | CPDBlock", in_channels: int, out_channels: int, rank: int) -> "CPDBlock":
        """A block with meaningless weights: geometry, dtype and device of `like`, and a bias if that has one."""
        weight = like.weight if isinstance(like, nn.Conv2d) else like.pointwise.weight
        return cls(
            in_channels, out_channels, like.kernel_size, rank, like.stride, like.padding, like.dilation,
            bias=like.bias is not None, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip

    @classmethod
    def from_factors(cls, factors: CPFactors, conv: nn.Conv2d) -> "CPDBlock":
        """The block with these factors of `conv`'s filters, and its stride, padding, dilation, bias and dtype.

        Raises:
            UserError: groups != 1, or padding other than zeros.
        """
        check_decomposable(conv)
        return cls._build(factors, conv, conv.bias)

    def factors(self) -> CPFactors:
        """The factors A [O, Kh, R], B [O, Kw, R], C [O, I, R] now in the block: copies, without gradient."""
        return CPFactors(*(part.detach().clone() for part in self._factor_views()))

    @torch.no_grad()
    def load_factors(self, factors: CPFactors) -> None:
        """Put other factors of the same shapes into the block's convolutions."""
        _, in_channels, _ = factors.C.shape
        self.pointwise.weight.copy_(factors.C.mT.reshape(-1, in_channels, 1, 1))
        self.horizontal.weight.copy_(factors.B.mT.reshape(-1, 1, 1, self.kernel_size[1]))
        self.vertical.weight.copy_(factors.A.mT.reshape(-1, 1, self.kernel_size[0], 1))

    def dense_weight(self) -> Tensor:
        """The weight [O, I, Kh, Kw] of the one convolution that the block equals (eq. 2); differentiable."""
        A, B, C = self._factor_views()
        return torch.einsum("ohr,owr,oir->oihw", A, B, C)

    def select_filters(self, index: Tensor) -> "CPDBlock":
        """A new block with the output filters `index` [O'] only."""
        bias = None if self.bias is None else self.bias[index]
        return self._build(self.factors().select_filters(index), self, bias)

    def select_inputs(self, index: Tensor) -> "CPDBlock":
        """A new block with the input channels `index` [I'] only.

        Raises:
            UserError: so few channels are left that the rank is above eq. 8.
        """
        return self._build(self.factors().select_inputs(index), self, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W'] (eq. 4-7)."""
        x = self.vertical(self.horizontal(self.pointwise(x)))
        if self.rank > 1:
            x = _sum_over_terms(x, self.rank)
        return x if self.bias is None else x + self.bias[:, None, None]

    def extra_repr(self) -> str:
        """What the block stands for."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )

    def _factor_views(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B, C as views of the three convolutions' weights."""
        terms = (self.out_channels, self.rank)
        A = self.vertical.weight.flatten(1).unflatten(0, terms).mT
        B = self.horizontal.weight.flatten(1).unflatten(0, terms).mT
        C = self.pointwise.weight.flatten(1).unflatten(0, terms).mT
        return A, B, C

    @classmethod
    def _build(cls, factors: CPFactors, like: "nn.Conv2d | CPDBlock", bias: Tensor | None) -> "CPDBlock":
        """A block with these factors and this bias, in the geometry, dtype, device and mode of `like`."""
        out_channels, in_channels, rank = factors.C.shape
        kernel_h, kernel_w = factors.A.shape[1], factors.B.shape[1]
        if (kernel_h, kernel_w) != tuple(like.kernel_size):
            raise ValueError(f"factors for {kernel_h}x{kernel_w} kernels, a layer with {like.kernel_size}")
        block = cls.shaped_like(like, in_channels, out_channels, rank)
        block.load_factors(factors)
        if block.bias is not None and bias is not None:
            with torch.no_grad():
                block.bias.copy_(bias)
        return block.train(like.training)


def _sum_over_terms(x: Tensor, rank: int) -> Tensor:
    """[N, O*R, H, W] -> [N, O, H, W], the sum over r (eq. 7), in the memory layout of x."""
    if x.is_contiguous(memory_format=torch.channels_last):  # a sum over an inner dimension would lose it
        return x.movedim(1, -1).unflatten(-1, (-1, rank)).sum(-1).movedim(-1, 1)
    return x.unflatten(1, (-1, rank)).sum(2)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _resolve_padding(padding: int | tuple[int, ...] | str, kernel_size: Pair, dilation: Pair) -> Padding:
    """Padding as numbers wherever it is the same on both sides."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        return "same" if total_h % 2 or total_w % 2 else (total_h // 2, total_w // 2)
    if isinstance(padding, str):
        raise ValueError(f"padding {padding!r}: expected numbers, 'same' or 'valid'")
    return _pair(padding)


def check_decomposable(conv: nn.Conv2d) -> None:
    if conv.groups != 1:
        raise UserError(f"a convolution with groups={conv.groups}: only groups=1 can become a CPDBlock")
    if conv.padding_mode != "zeros":
        raise UserError(f"a convolution with padding_mode={conv.padding_mode!r}: only 'zeros' can become a CPDBlock")

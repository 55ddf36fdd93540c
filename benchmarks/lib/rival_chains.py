"""The chains of convolutions that factorised layers run as: their shapes, their cost, the ranks for a budget."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.lib.rivals import Rival
from norton_deploy.errors import UserError

Axes = Literal["none", "horizontal", "vertical", "both"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Link:
    """One convolution of a chain.

    Attributes:
        in_channels, out_channels: its channels.
        depthwise: whether every channel has its own kernel (groups = channels).
        axes: along which axes it has the dense layer's kernel, stride, padding and dilation; 1, 1, 0, 1 elsewhere.
    """

    in_channels: int
    out_channels: int
    depthwise: bool
    axes: Axes

    def kernel_size(self, kernel: Size) -> Size:
        """(height, width) of its kernel in a chain for `kernel`."""
        return (
            kernel[0] if self.axes in ("vertical", "both") else 1,
            kernel[1] if self.axes in ("horizontal", "both") else 1,
        )


def chain(kind: Rival | Literal["filter"], out_channels: int, in_channels: int, ranks: tuple[int, ...]) -> list[Link]:
    """The convolutions of a factorised layer, in the order of the data.

    Args:
        kind: which factorisation; "filter" is the paper's own (eq. 4-6), which `CPDBlock` runs.
        out_channels, in_channels: O and I.
        ranks: (R,), and for "tucker2" (P, Q), the ranks of the output and of the input channels.
    """
    if kind == "filter":
        width = ranks[0] * out_channels
        return [
            Link(in_channels, width, False, "none"),
            Link(width, width, True, "horizontal"),
            Link(width, width, True, "vertical"),
        ]
    first, last = ranks[-1], ranks[0]
    ends = Link(in_channels, first, False, "none"), Link(last, out_channels, False, "none")
    if kind == "tucker2":
        return [ends[0], Link(first, last, False, "both"), ends[1]]
    if kind == "reshaped":
        return [ends[0], Link(first, first, True, "both"), ends[1]]
    return [ends[0], Link(first, first, True, "horizontal"), Link(first, first, True, "vertical"), ends[1]]


def chain_macs(links: list[Link], kernel: Size, input_size: Size, output_size: Size) -> int:
    """MACs of one image through a chain that takes maps of `input_size` to `output_size` (height, width)."""
    total, (height, width) = 0, input_size
    for link in links:
        if link.axes in ("vertical", "both"):
            height = output_size[0]
        if link.axes in ("horizontal", "both"):
            width = output_size[1]
        total += height * width * _weights(link, kernel)
    return total


def chain_params(links: list[Link], kernel: Size) -> int:
    """Numbers in the kernels of a chain (a bias, if any, is the dense layer's)."""
    return sum(_weights(link, kernel) for link in links)


def _weights(link: Link, kernel: Size) -> int:
    kernel_h, kernel_w = link.kernel_size(kernel)
    return link.out_channels * (1 if link.depthwise else link.in_channels) * kernel_h * kernel_w


def ranks_within(kind: Rival, weight: Tensor, budget: int, input_size: Size, output_size: Size) -> tuple[int, ...]:
    """The ranks whose MACs come closest to `budget` from below.

    Tucker-2 has many such pairs: for each input rank Q the largest output rank P that fits. Of these the one
    with the smallest error of the truncated HOSVD (De Lathauwer et al., 2000) is taken. Its often used bound, the
    sum of both modes' cut-off energies, counts twice what both cut off, and prefers one mode that is nearly whole.

    Args:
        kind: which factorisation.
        weight: [O, I, Kh, Kw].
        budget: MACs of the layer for one image.
        input_size, output_size: (height, width) of the layer's maps.

    Returns:
        (R,) or (P, Q), never above what an exact factorisation needs.

    Raises:
        UserError: not even rank 1 fits.
    """
    out_channels, in_channels, *kernel_size = weight.shape
    kernel = (kernel_size[0], kernel_size[1])

    def macs(*ranks: int) -> int:
        return chain_macs(chain(kind, out_channels, in_channels, ranks), kernel, input_size, output_size)

    if macs(*((1, 1) if kind == "tucker2" else (1,))) > budget:
        raise UserError(f"{kind}: {budget} MACs are below rank 1 of a layer {tuple(weight.shape)}")
    if kind != "tucker2":
        modes = [out_channels, in_channels, *((kernel[0], kernel[1]) if kind == "layer" else (kernel[0] * kernel[1],))]
        exact = weight.numel() // max(modes)
        return (min(budget // macs(1), exact),)
    kept = _kept_energies(weight.detach().double())
    best: tuple[float, tuple[int, int]] | None = None
    for input_rank in range(1, in_channels + 1):
        slope, offset = macs(2, input_rank) - macs(1, input_rank), 2 * macs(1, input_rank) - macs(2, input_rank)
        output_rank = min(out_channels, (budget - offset) // slope)
        if output_rank >= 1:
            energy = float(kept[output_rank - 1, input_rank - 1])
            if best is None or energy > best[0]:
                best = energy, (output_rank, input_rank)
    assert best is not None  # (1, 1) fits
    return best[1]


def _kept_energies(weight: Tensor) -> Tensor:
    """[O, I]: entry (P - 1, Q - 1) is the squared norm of what the HOSVD truncated to ranks P, Q keeps."""
    core = weight
    for mode in (0, 1):
        unfolded = weight.movedim(mode, 0).flatten(1)
        vectors = torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors.flip(1)  # descending
        core = torch.tensordot(vectors, core, dims=([0], [mode])).movedim(0, mode)
    return core.square().sum((2, 3)).cumsum(0).cumsum(1)

"""Factorised layers as chains of convolutions: shapes and cost, the ranks for a budget, and the layers themselves."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from norton_deploy.errors import UserError
from norton_deploy.method.layer_factors import LayerCP, LayerFactors, LayerForm, ReshapedCP, Tucker2, singular_vectors

Axes = Literal["none", "horizontal", "vertical", "both"]
Size = tuple[int, int]
KIND_OF: dict[type, LayerForm] = {LayerCP: "layer", ReshapedCP: "reshaped", Tucker2: "tucker2"}


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


def chain(
    kind: LayerForm | Literal["filter"], out_channels: int, in_channels: int, ranks: tuple[int, ...]
) -> list[Link]:
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
        kernel_h, kernel_w = link.kernel_size(kernel)
        inputs = 1 if link.depthwise else link.in_channels
        total += height * width * link.out_channels * inputs * kernel_h * kernel_w
    return total


def ranks_within(kind: LayerForm, weight: Tensor, budget: int, input_size: Size, output_size: Size) -> tuple[int, ...]:
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


def rival_sequence(factors: LayerFactors, conv: nn.Conv2d) -> nn.Sequential:
    """The chain that computes the convolution with the recomposed weight, in the geometry, dtype and mode of `conv`.

    [N, I, H, W] -> [N, O, H', W'], equal to `conv` with the weight `factors.reconstruct()` but for rounding.

    Raises:
        UserError: groups != 1, or padding other than zeros.
    """
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise UserError(f"{conv}: only a convolution with groups=1 and zero padding can be factorised")
    kernels = _kernels(factors)
    ranks = (factors.output.shape[1], factors.input.shape[1])
    links = chain(KIND_OF[type(factors)], conv.out_channels, conv.in_channels, ranks)
    layers = []
    for link, kernel in zip(links, kernels, strict=True):
        is_last = link is links[-1]
        layer = _convolution(link, conv, bias=is_last and conv.bias is not None)
        with torch.no_grad():
            layer.weight.copy_(kernel)
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        layers.append(layer)
    return nn.Sequential(*layers).train(conv.training)


def replace_by_rivals(model: nn.Module, factors: Mapping[str, LayerFactors]) -> nn.Module:
    """A copy of a dense model with the named convolutions replaced by their chains."""
    small = copy.deepcopy(model)
    for name, found in factors.items():
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d):
            raise UserError(f"layer '{name}': a {type(conv).__name__}, expected a convolution")
        small.set_submodule(name, rival_sequence(found, conv))
    return small.train(model.training)


def map_sizes(model: nn.Module, names: Iterable[str], image_size: Size) -> dict[str, tuple[Size, Size]]:
    """(height, width) of each named layer's input and output maps in a classifier that sees one image."""
    shadow = copy.deepcopy(model).to("meta").eval()
    sizes: dict[str, tuple[Size, Size]] = {}

    def record(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        (height_in, width_in), (height_out, width_out) = inputs[0].shape[-2:], output.shape[-2:]
        sizes[name] = ((height_in, width_in), (height_out, width_out))

    for name in names:
        shadow.get_submodule(name).register_forward_hook(
            lambda _layer, inputs, output, name=name: record(name, inputs, output)
        )
    with torch.no_grad():
        shadow(torch.empty(1, 3, *image_size, device="meta"))
    return sizes


def _kernels(factors: LayerFactors) -> list[Tensor]:
    """The weights [out, in or 1, kh, kw] of the chain's convolutions."""
    entry, end = factors.input.mT[:, :, None, None], factors.output[:, :, None, None]
    if isinstance(factors, LayerCP):
        return [entry, factors.horizontal.mT[:, None, None, :], factors.vertical.mT[:, None, :, None], end]
    if isinstance(factors, ReshapedCP):
        return [entry, torch.einsum("hwr->rhw", factors.spatial)[:, None], end]
    return [entry, factors.core, end]


def _convolution(link: Link, conv: nn.Conv2d, *, bias: bool) -> nn.Conv2d:
    """The link's convolution with the stride, padding and dilation of `conv` along the link's axes."""
    takes = link.axes in ("vertical", "both"), link.axes in ("horizontal", "both")

    def along(values: tuple[int, ...], elsewhere: int) -> Size:
        return (values[0] if takes[0] else elsewhere, values[1] if takes[1] else elsewhere)

    padding: str | Size = "same" if conv.padding == "same" and any(takes) else (0, 0)
    if not isinstance(conv.padding, str):
        padding = along(conv.padding, 0)
    return nn.Conv2d(
        link.in_channels,
        link.out_channels,
        link.kernel_size((conv.kernel_size[0], conv.kernel_size[1])),
        stride=along(conv.stride, 1),
        padding=padding,
        dilation=along(conv.dilation, 1),
        groups=link.in_channels if link.depthwise else 1,
        bias=bias,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


def _kept_energies(weight: Tensor) -> Tensor:
    """[O, I]: entry (P - 1, Q - 1) is the squared norm of what the HOSVD truncated to ranks P, Q keeps."""
    core = weight
    for mode in (0, 1):
        vectors = singular_vectors(weight, mode, weight.shape[mode])
        core = torch.tensordot(vectors, core, dims=([0], [mode])).movedim(0, mode)
    return core.square().sum((2, 3)).cumsum(0).cumsum(1)

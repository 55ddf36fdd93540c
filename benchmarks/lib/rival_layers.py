"""Convolutions factorised the classical ways (Figure 1), as chains of ordinary convolutions."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.lib.rival_chains import Link, Size, chain
from benchmarks.lib.rivals import LayerCP, ReshapedCP, Rival, RivalFactors, Tucker2
from norton_deploy.compression.surgery import replace_submodule
from norton_deploy.errors import UserError

KIND_OF: dict[type, Rival] = {LayerCP: "layer", ReshapedCP: "reshaped", Tucker2: "tucker2"}


def rival_sequence(factors: RivalFactors, conv: nn.Conv2d) -> nn.Sequential:
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


def replace_by_rivals(model: nn.Module, factors: Mapping[str, RivalFactors]) -> nn.Module:
    """A copy of a dense model with the named convolutions replaced by their chains."""
    small = copy.deepcopy(model)
    for name, found in factors.items():
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d):
            raise UserError(f"layer '{name}': a {type(conv).__name__}, expected a convolution")
        replace_submodule(small, name, rival_sequence(found, conv))
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


def _kernels(factors: RivalFactors) -> list[Tensor]:
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

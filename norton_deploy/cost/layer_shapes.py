"""Every call of a layer with weights during one image, with the shapes that decide its cost."""

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from norton_deploy.compression.cpd_block import CPDBlock, Pair
from norton_deploy.compression.lowering import Form
from norton_deploy.cost.complexity import run_on_meta

LayerKind = Literal["conv", "transposed", "linear"]
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class LayerShape:
    """Everything about a layer and its input that decides how long it takes.

    Attributes:
        kind: a convolution (or the convolution that a CPDBlock stands for), transposed convolution or linear layer.
        in_channels, out_channels: features in and out.
        kernel, stride, padding, dilation: (vertical, horizontal); ones and zeros for a linear layer.
        rank: R of a CPDBlock, 0 for a plain layer.
        input_size: (batch, height, width) of the input; (rows, 1, 1) for a linear layer.
    """

    kind: LayerKind
    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    rank: int
    input_size: tuple[int, int, int]

    @classmethod
    def of(cls, layer: nn.Module, input_shape: tuple[int, ...]) -> "LayerShape":
        """The shape of a layer that gets an input [N, I, H, W] or [N, F].

        Raises:
            TypeError: not an ungrouped convolution, transposed convolution, linear layer or CPDBlock.
        """
        if isinstance(layer, nn.Linear):
            one, none = (1, 1), (0, 0)
            size = (input_shape[0], 1, 1)
            return cls("linear", layer.in_features, layer.out_features, one, one, none, one, 0, size)
        plain = isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.groups == 1
        if not plain and not isinstance(layer, CPDBlock):
            raise TypeError(f"cannot time a layer of class {type(layer).__name__}")
        found: Any = layer
        return cls(
            "transposed" if isinstance(layer, nn.ConvTranspose2d) else "conv",
            found.in_channels,
            found.out_channels,
            tuple(found.kernel_size),
            tuple(found.stride),
            tuple(found.padding),
            tuple(found.dilation),
            layer.rank if isinstance(layer, CPDBlock) else 0,
            (input_shape[0], input_shape[2], input_shape[3]),
        )

    def resized(self, in_channels: int, out_channels: int, rank: int) -> "LayerShape":
        """The same layer with other widths and another rank."""
        return replace(self, in_channels=in_channels, out_channels=out_channels, rank=rank)

    @property
    def output_pixels(self) -> int:
        """Positions of one output channel, all images together."""
        batch, *input_size = self.input_size
        pixels = batch
        for size, k, s, p, d in zip(input_size, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            if self.kind == "transposed":
                pixels *= (size - 1) * s - 2 * p + d * (k - 1) + 1
            else:
                pixels *= (size + 2 * p - d * (k - 1) - 1) // s + 1
        return pixels

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations, as `norton_deploy.cost.complexity` counts them."""
        batch, height, width = self.input_size
        kernel_h, kernel_w = self.kernel
        if self.kind == "transposed":
            taps = kernel_h * kernel_w // (self.stride[0] * self.stride[1])
            return self.output_pixels * self.in_channels * self.out_channels * taps
        if not self.rank:
            return self.output_pixels * self.in_channels * self.out_channels * kernel_h * kernel_w
        terms = self.rank * self.out_channels
        # eq. 4 at the input's positions, eq. 5 with the columns strided, eq. 6 with both axes strided.
        strided = replace(self, rank=0, kernel=(1, kernel_w), stride=(1, self.stride[1]),
                          padding=(0, self.padding[1]), dilation=(1, self.dilation[1]))  # fmt: skip
        return terms * (
            batch * height * width * self.in_channels + strided.output_pixels * kernel_w + self.output_pixels * kernel_h
        )

    @property
    def params(self) -> int:
        """Weights, without a bias."""
        kernel_h, kernel_w = self.kernel
        if self.rank:
            return self.rank * self.out_channels * (self.in_channels + kernel_h + kernel_w)
        return self.in_channels * self.out_channels * kernel_h * kernel_w

    def key(self, form: Form) -> str:
        """A readable name for tables."""
        sizes = "x".join(map(str, self.input_size))
        geometry = " ".join(
            f"{name}{value[0]}x{value[1]}"
            for name, value in (("k", self.kernel), ("s", self.stride), ("p", self.padding), ("d", self.dilation))
        )
        rank = f" rank {self.rank}" if self.rank and form != "dense" else ""
        return f"{self.kind} {self.in_channels}>{self.out_channels} {geometry}{rank} {form} on {sizes}"


@dataclass(frozen=True)
class LayerCall:
    """One call of the layer `name`; a layer shared between pyramid levels has one call for each."""

    name: str
    shape: LayerShape


def layer_calls(
    model: nn.Module, image_size: tuple[int, int], *, proposals: int = 1000, detections: int = 100, batch: int = 1
) -> list[LayerCall]:
    """The calls for one batch, in order; nothing is computed (meta device).

    Args:
        model: classifier or detector, dense or compressed.
        image_size: (height, width) of the images; a detector pads them to its size divisor.
        proposals, detections: RoIs per image through the box head and through the mask or keypoint head.
        batch: images.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    inside = tuple(f"{name}." for name, layer in shadow.named_modules() if isinstance(layer, CPDBlock))
    calls: list[LayerCall] = []

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(LayerCall(name, LayerShape.of(layer, tuple(inputs[0].shape))))

    for name, layer in shadow.named_modules():
        if isinstance(layer, (CPDBlock, *LAYERS)) and not name.startswith(inside):
            layer.register_forward_pre_hook(lambda module, inputs, name=name: record(name, module, inputs))
    run_on_meta(shadow, image_size, proposals * batch, detections * batch, batch)
    return calls

"""One layer as an ONNX graph of its own, in each exact form, for timing it on an engine."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from norton_deploy.compression.cpd_block import CPDBlock, Pair
from norton_deploy.compression.lowering import Form

Kind = Literal["conv", "transposed", "linear"]
OPSET, IR_VERSION = 20, 10


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

    kind: Kind
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


def layer_graph(shape: LayerShape, form: Form) -> tuple[bytes, npt.NDArray[np.float32]]:
    """An ONNX model of one layer with random weights, and an input for it.

    A plain layer has the form "dense" only. The convolutions are those of `lower_block`.
    """
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []

    def add(operator: str, weight_shape: tuple[int, ...], width: int, **attributes: Any) -> None:
        index = len(nodes)
        fan_in = max(1, int(np.prod(weight_shape)) // width)
        weight = generator.standard_normal(weight_shape, np.float32) / np.float32(np.sqrt(fan_in))
        weights.append(numpy_helper.from_array(weight, f"weight_{index}"))
        weights.append(numpy_helper.from_array(np.zeros(width, np.float32), f"bias_{index}"))
        source = f"value_{index}" if index else "input"
        nodes.append(
            helper.make_node(
                operator, [source, f"weight_{index}", f"bias_{index}"], [f"value_{index + 1}"], **attributes
            )
        )

    batch, height, width = shape.input_size
    inputs, outputs, terms = shape.in_channels, shape.out_channels, shape.rank * shape.out_channels
    (kernel_h, kernel_w), (stride_h, stride_w) = shape.kernel, shape.stride
    (pad_h, pad_w), (dilation_h, dilation_w) = shape.padding, shape.dilation
    geometry = {
        "strides": [stride_h, stride_w],
        "pads": [pad_h, pad_w, pad_h, pad_w],
        "dilations": [dilation_h, dilation_w],
    }
    if shape.kind == "linear":
        add("Gemm", (outputs, inputs), outputs, transB=1)
    elif shape.kind == "transposed":
        add("ConvTranspose", (inputs, outputs, kernel_h, kernel_w), outputs, **geometry)
    elif form == "dense":
        add("Conv", (outputs, inputs, kernel_h, kernel_w), outputs, **geometry)
    else:
        add("Conv", (terms, inputs, 1, 1), terms)
        if form == "grouped":
            add("Conv", (outputs, shape.rank, kernel_h, kernel_w), outputs, group=outputs, **geometry)
        else:
            add("Conv", (terms, 1, 1, kernel_w), terms, group=terms, strides=[1, stride_w],
                pads=[0, pad_w, 0, pad_w], dilations=[1, dilation_w])  # fmt: skip
            add("Conv", (outputs, shape.rank, kernel_h, 1), outputs, group=outputs, strides=[stride_h, 1],
                pads=[pad_h, 0, pad_h, 0], dilations=[dilation_h, 1])  # fmt: skip
    input_shape = [batch, inputs] if shape.kind == "linear" else [batch, inputs, height, width]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info(f"value_{len(nodes)}", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString(), generator.standard_normal(input_shape, np.float32)

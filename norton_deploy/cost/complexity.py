"""The one counter of multiply-accumulate operations (MACs) and parameters, and every call of a layer with its shape.

MACs are those of convolutions and linear layers; a CPDBlock counts as its three convolutions (eq. 4-6, no
further lowering), a FactoredConv as its two or three. Biases, normalisation, pooling, activations, RoIAlign and NMS
are not counted. Parameters include the affine terms of every normalisation, also of a frozen one. The paper's MACs add
BatchNorm and pooling: 0.92 G for ResNet-50 by its plan, 0.8996 G here.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.channel_groups import NORMS, is_detector
from norton_deploy.compression.cpd_block import CPDBlock, Pair
from norton_deploy.compression.lowering import Form
from norton_deploy.models.detectors import ModelSettings

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
        groups: of a plain convolution; the middle one of a `FactoredConv` may have several.
        in_float: whether it stays in float where a graph has 8 bits.
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
    groups: int = 1
    in_float: bool = False

    @classmethod
    def of(cls, layer: nn.Module, input_shape: tuple[int, ...]) -> "LayerShape":
        """The shape of a layer that gets an input [N, I, H, W] or [N, F].

        Raises:
            TypeError: not a convolution, ungrouped transposed convolution, linear layer or CPDBlock.
        """
        if isinstance(layer, nn.Linear):
            one, none = (1, 1), (0, 0)
            size = (input_shape[0], 1, 1)
            return cls("linear", layer.in_features, layer.out_features, one, one, none, one, 0, size)
        groups = layer.groups if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else 1
        plain = isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.ConvTranspose2d) and groups == 1)
        if not plain and not isinstance(layer, CPDBlock):
            raise TypeError(f"cannot time a layer of class {type(layer).__name__}")
        found: Any = layer
        kind: LayerKind = "transposed" if isinstance(layer, nn.ConvTranspose2d) else "conv"
        rank = layer.rank if isinstance(layer, CPDBlock) else 0
        size = (input_shape[0], input_shape[2], input_shape[3])
        return cls(
            kind, found.in_channels, found.out_channels, found.kernel_size, found.stride, found.padding, found.dilation,
            rank, size, groups,
        )  # fmt: skip

    def resized(self, in_channels: int, out_channels: int, rank: int) -> "LayerShape":
        """The same layer with other widths and another rank."""
        return replace(self, in_channels=in_channels, out_channels=out_channels, rank=rank)

    @property
    def output_size(self) -> Pair:
        """(height, width) of the output."""
        sizes = []
        axes = zip(self.input_size[1:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        for size, k, s, p, d in axes:
            if self.kind == "transposed":
                sizes.append((size - 1) * s - 2 * p + d * (k - 1) + 1)
            else:
                sizes.append((size + 2 * p - d * (k - 1) - 1) // s + 1)
        return sizes[0], sizes[1]

    @property
    def output_pixels(self) -> int:
        """Positions of one output channel, all images together."""
        return self.input_size[0] * self.output_size[0] * self.output_size[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations, as `norton_deploy.cost.complexity` counts them."""
        batch, height, width = self.input_size
        kernel_h, kernel_w = self.kernel
        if self.kind == "transposed":
            taps = kernel_h * kernel_w // (self.stride[0] * self.stride[1])
            return self.output_pixels * self.in_channels * self.out_channels * taps
        if not self.rank:
            return self.output_pixels * self.in_channels // self.groups * self.out_channels * kernel_h * kernel_w
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
        return self.in_channels // self.groups * self.out_channels * kernel_h * kernel_w

    def key(self, form: Form) -> str:
        """A readable name for tables."""
        sizes = "x".join(map(str, self.input_size))
        geometry = " ".join(
            f"{name}{value[0]}x{value[1]}"
            for name, value in (("k", self.kernel), ("s", self.stride), ("p", self.padding), ("d", self.dilation))
        )
        rank = f" rank {self.rank}" if self.rank and form != "dense" else ""
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.kind} {self.in_channels}>{self.out_channels} {geometry}{groups}{rank} {form} on {sizes}"


@dataclass(frozen=True)
class LayerCall:
    """One call of the layer `name`; a layer shared between pyramid levels has one call for each."""

    name: str
    shape: LayerShape


def layer_calls(
    model: nn.Module, image_size: tuple[int, int], *, proposals: int = 1000, detections: int = 100
) -> list[LayerCall]:
    """The calls for one image, in order; nothing is computed (meta device).

    Args:
        model: classifier or detector, dense or compressed.
        image_size: (height, width) of the images; a detector pads them to its size divisor.
        proposals, detections: RoIs per image through the box head and through the mask or keypoint head.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    inside = tuple(f"{name}." for name, layer in shadow.named_modules() if isinstance(layer, CPDBlock))
    calls: list[LayerCall] = []

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(LayerCall(name, LayerShape.of(layer, tuple(inputs[0].shape))))

    for name, layer in shadow.named_modules():
        if isinstance(layer, (CPDBlock, *LAYERS)) and not name.startswith(inside):
            layer.register_forward_pre_hook(lambda module, inputs, name=name: record(name, module, inputs))
    run_on_meta(shadow, image_size, proposals, detections)
    return calls


@dataclass(frozen=True)
class LayerComplexity:
    """One layer: its name, class name, MACs over all calls, parameters, and last output's shape."""

    name: str
    kind: str
    macs: int
    params: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Complexity:
    """MACs of one image and parameters of a whole model, and the layers that they come from.

    `image_size` is (height, width) in pixels, `proposals` and `detections` are the RoIs through a detector's heads.
    """

    macs: int
    params: int
    layers: tuple[LayerComplexity, ...]
    image_size: tuple[int, int]
    proposals: int
    detections: int


def layer_macs(layer: nn.Module, output: Tensor) -> int:
    """MACs of one call of a convolution or linear layer that gave `output`; 0 for a normalisation.

    Raises:
        TypeError: a layer with parameters of a kind that this counter does not know.
    """
    if isinstance(layer, nn.Conv2d):
        return output.numel() * (layer.in_channels // layer.groups) * layer.kernel_size[0] * layer.kernel_size[1]
    if isinstance(layer, nn.ConvTranspose2d):
        # Every input element meets the whole kernel: the output has stride^2 times as many elements.
        outputs_per_input = layer.stride[0] * layer.stride[1]
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        return output.numel() * (layer.in_channels // layer.groups) * kernel // outputs_per_input
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    if isinstance(layer, NORMS):
        return 0
    raise TypeError(f"no MAC count for a layer of class {type(layer).__name__}; add it to layer_macs")


def layer_params(layer: nn.Module) -> int:
    """Parameters a layer itself holds, a FrozenBatchNorm2d's affine terms included."""
    count = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    if isinstance(layer, FrozenBatchNorm2d):
        count += layer.weight.numel() + layer.bias.numel()
    return count


def count_complexity(
    model: nn.Module, image_size: tuple[int, int], *, proposals: int = 1000, detections: int = 0
) -> Complexity:
    """Count a classifier or a two-stage detector for one image.

    Runs on the meta device: nothing is computed, no memory is used, and the weights do not matter.

    Args:
        model: classifier or torchvision detector, dense or compressed.
        image_size: (height, width) in pixels of the image that enters the backbone; a detector pads it up
            to its size divisor (32).
        proposals: RoIs through the box head.
        detections: RoIs through the mask or keypoint head.

    Raises:
        TypeError: the model holds a layer of an unknown kind.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    names = {layer: name for name, layer in shadow.named_modules()}
    macs: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def record(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        name = names[layer]
        macs[name] = macs.get(name, 0) + layer_macs(layer, output)
        shapes[name] = tuple(output.shape)

    counted = [layer for layer in shadow.modules() if layer_params(layer) and not list(layer.children())]
    for layer in counted:
        layer.register_forward_hook(record)
    run_on_meta(shadow, image_size, proposals, detections)
    layers = tuple(
        LayerComplexity(name, type(layer).__name__, macs.get(name, 0), layer_params(layer), shapes.get(name, ()))
        for name, layer in ((names[layer], layer) for layer in counted)
    )
    params = sum(layer_params(layer) for layer in shadow.modules())
    proposals, detections = (proposals, detections) if is_detector(shadow) else (0, 0)
    return Complexity(sum(layer.macs for layer in layers), params, layers, image_size, proposals, detections)


def complexity_of(model: nn.Module, settings: ModelSettings) -> Complexity:
    """Count a model, dense or compressed, at the size that it is made for.

    Args:
        model: classifier or detector.
        settings: its settings: an image of their input size; a detector's short side is taken for both sides, and
            as many proposals reach the box head as in testing.
    """
    return count_complexity(model, settings.input_size, proposals=settings.proposals)


@torch.no_grad()
def run_on_meta(model: Any, image_size: tuple[int, int], proposals: int, detections: int) -> None:
    """Send an image's tensors through a classifier, or through every stage of a detector that has weights.

    Args:
        model: on the meta device.
        image_size: (height, width).
        proposals, detections: RoIs through the box head and through the mask or keypoint head.
    """
    if not is_detector(model):
        model(torch.empty(1, 3, *image_size, device="meta"))
        return
    divisor = model.transform.size_divisible
    height, width = (-(-side // divisor) * divisor for side in image_size)
    features = model.backbone(torch.empty(1, 3, height, width, device="meta"))
    model.rpn.head(list(features.values()))
    channels = model.backbone.out_channels
    heads = model.roi_heads

    def pooled(pool: Any, count: int) -> Tensor:
        return torch.empty(count, channels, *pool.output_size, device="meta")

    heads.box_predictor(heads.box_head(pooled(heads.box_roi_pool, proposals)))
    if detections and heads.has_mask():
        heads.mask_predictor(heads.mask_head(pooled(heads.mask_roi_pool, detections)))
    if detections and heads.has_keypoint():
        points = heads.keypoint_head(pooled(heads.keypoint_roi_pool, detections))
        # The predictor's resizing is no convolution; only its transposed convolution counts.
        heads.keypoint_predictor.kps_score_lowres(points)

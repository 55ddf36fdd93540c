"""Training with 8 bits in mind: weights and layers' inputs are rounded as an int8 graph rounds them.

The layers that an int8 graph has in 8 bits (export/quantise.py) compute with torch's fake quantisation: values are
rounded to 256 levels and stay floats, and the gradient passes as if they were not rounded (Bengio, Leonard, Courville:
Estimating or propagating gradients through stochastic neurons, 2013). Weights have a symmetric scale for each output
channel, as the graph's; a normalisation that is folded in later scales a channel's weights and their levels alike.
Inputs have the range of the batch at hand: nothing is kept beside the weights, checkpoints are those of any training,
and `export_onnx --precision int8` calibrates the tuned weights. What lies between the layers (sums, pooling) is not
rounded here.
"""

from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.training.forms import RecomposedBlock

LARGEST_WEIGHT, LARGEST_INPUT = 127, 255
FLOAT_LAYERS = (
    "backbone.body.conv1",
    "rpn.head.cls_logits",
    "rpn.head.bbox_pred",
    "roi_heads.box_predictor",
    "roi_heads.mask_predictor",
    "roi_heads.keypoint_predictor",
)
"""What stays in float in a graph too: the stem, and the last layers of RPN and heads."""
M = TypeVar("M", bound=nn.Module)


def rounded_weight(weight: Tensor) -> Tensor:
    """A weight [O, ...] on 255 levels around zero, for each output channel as wide as its largest value."""
    largest = weight.detach().flatten(1).abs().amax(dim=1)
    scale = (largest / LARGEST_WEIGHT).clamp(min=1e-12)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT)


def rounded_input(values: Tensor) -> Tensor:
    """Activations of any shape on 256 levels from the lowest to the highest, 0 being one of them; float32."""
    values = values.float()
    low, high = values.detach().aminmax() if values.numel() else (values.new_zeros(()), values.new_zeros(()))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / LARGEST_INPUT).clamp(min=1e-12)
    zero = (-low / scale).round().clamp(0, LARGEST_INPUT).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, LARGEST_INPUT)


class RoundedConv2d(nn.Conv2d):
    """A convolution in 8 bits."""

    @classmethod
    def sharing(cls, conv: nn.Conv2d) -> Self:
        """One with the very weight and bias of `conv`."""
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        geometry: dict[str, Any] = {name: getattr(conv, name) for name in names}
        twin = cls(**geometry, device="meta")
        twin.weight, twin.bias = conv.weight, conv.bias
        return twin.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`'s."""
        return self._conv_forward(rounded_input(input), rounded_weight(self.weight), self.bias)


class RoundedLinear(nn.Linear):
    """A linear layer in 8 bits."""

    @classmethod
    def sharing(cls, linear: nn.Linear) -> Self:
        """One with the very weight and bias of `linear`."""
        twin = cls(linear.in_features, linear.out_features, device="meta")
        twin.weight, twin.bias = linear.weight, linear.bias
        return twin.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`'s."""
        return functional.linear(rounded_input(input), rounded_weight(self.weight), self.bias)


class RoundedBlock(RecomposedBlock):
    """A CPDBlock in 8 bits, in the two convolutions that it has in a graph (`lowering.lower_block`, grouped)."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W']."""
        A, B, _ = self._factor_views()
        with torch.autocast(x.device.type, enabled=False):
            kernels = rounded_weight(torch.einsum("ohr,owr->orhw", A, B))
        terms = functional.conv2d(rounded_input(x), rounded_weight(self.pointwise.weight))
        return functional.conv2d(
            rounded_input(terms), kernels, self.bias, self.stride, self.padding, self.dilation, self.out_channels
        )


def round_layers(detector: M) -> M:
    """Have a detector's layers compute in 8 bits, in place, but for `FLOAT_LAYERS` and transposed convolutions.

    Returns:
        `detector`, with the same Parameters under the same names; the layers that hold them are new.
    """
    inside_blocks: set[nn.Module] = set()
    for name, layer in list(detector.named_modules()):
        if layer in inside_blocks or name.startswith(FLOAT_LAYERS):
            continue
        if isinstance(layer, CPDBlock):
            inside_blocks.update(layer.children())
            detector.set_submodule(name, RoundedBlock.sharing(layer))
        elif isinstance(layer, nn.Conv2d):
            detector.set_submodule(name, RoundedConv2d.sharing(layer))
        elif isinstance(layer, nn.Linear):
            detector.set_submodule(name, RoundedLinear.sharing(layer))
    return detector

"""The one counter of multiply-accumulate operations (MACs) and parameters.

MACs are those of convolutions and linear layers; a CPDBlock counts as its three convolutions (eq. 4-6, no
further lowering). Biases, normalisation, pooling, activations, RoIAlign and NMS are not counted. Parameters
include the affine terms of every normalisation, also of a frozen one. The paper's MACs add BatchNorm and pooling:
0.92 G for ResNet-50 by its plan, 0.8996 G here.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.channel_groups import is_detector
from norton_deploy.models.detectors import ModelSettings

_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, nn.GroupNorm)


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
    if isinstance(layer, _NORMS):
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
        LayerComplexity(
            names[layer],
            type(layer).__name__,
            macs.get(names[layer], 0),
            layer_params(layer),
            shapes.get(names[layer], ()),
        )
        for layer in counted
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
def run_on_meta(model: Any, image_size: tuple[int, int], proposals: int, detections: int, batch: int = 1) -> None:
    """Send tensors of the right shapes through a classifier, or through every stage of a detector that has weights.

    Args:
        model: on the meta device.
        image_size: (height, width) of the images.
        proposals, detections: RoIs in all, through the box head and through the mask or keypoint head.
        batch: images.
    """
    if not is_detector(model):
        model(torch.empty(batch, 3, *image_size, device="meta"))
        return
    divisor = model.transform.size_divisible
    height, width = (-(-side // divisor) * divisor for side in image_size)
    features = model.backbone(torch.empty(batch, 3, height, width, device="meta"))
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

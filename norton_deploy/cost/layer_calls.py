"""Every call of a layer with weights during one image, with the shapes that decide its cost."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from norton_deploy.compression.compress import is_detector
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.cost.complexity import run_detector
from norton_deploy.cost.layer_graphs import LayerShape

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class LayerCall:
    """One call of the layer `name`; a layer shared between pyramid levels has one call for each."""

    name: str
    shape: LayerShape


@torch.no_grad()
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
    if is_detector(shadow):
        detector: Any = shadow
        run_detector(detector, image_size, proposals * batch, detections * batch, batch)
    else:
        shadow(torch.empty(batch, 3, *image_size, device="meta"))
    return calls

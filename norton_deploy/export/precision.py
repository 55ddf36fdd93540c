"""Half precision where it pays and nowhere else.

TensorRT 11 has no fp16 flag and TensorRT-RTX networks are strongly typed: the precision of every operator is the
one in the graph. The casts are made in the module, before export, because there each tensor's meaning is known;
a tool that rewrites the finished graph has to guess which of its 500 operators are coordinates.

fp16: the convolutions and linear layers of backbone, pyramid and heads, and what moves their results (pooling,
upsampling by copy, gathering, RoIAlign's two contractions): all but 1 % of the multiplications. Unrolled NMS counts
suppressors in fp16, which is exact.
fp32: normalisation of pixels, GroupNorm, anchors, box decoding, areas, IoU, NMS, sampling positions, softmax,
sigmoid, TopK, and the last layer of each head. Those layers are small, and scores rounded to fp16 tie by the
hundred: which of them TopK keeps would then be left to chance.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.export.static_rcnn import StaticRCNN

HALF_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
NORMALISATIONS = (_NormBase, FrozenBatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class Float32(nn.Module):
    """A layer that computes in fp32 inside a half-precision model."""

    def __init__(self, layer: nn.Module, *, keep: bool) -> None:
        """
        Args:
            layer: takes and gives one tensor, or gives several.
            keep: whether its result stays fp32; otherwise it is cast back to the input's type.
        """
        super().__init__()
        self.layer = layer
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The layer's result for `x` in fp32."""
        result: Tensor = self.layer(x.to(torch.float32))
        return result if self.keep else result.to(x.dtype)


def to_fp16(detector: StaticRCNN) -> StaticRCNN:
    """Change `detector`, in place, to compute in fp16 where the module's docstring says so, and return it."""
    kept = _last_layers(detector)
    for parent in list(detector.modules()):
        if parent in kept or isinstance(parent, Float32):
            continue
        if isinstance(parent, HALF_LAYERS):
            parent.half()
        for name, child in parent.named_children():
            if isinstance(child, NORMALISATIONS):
                setattr(parent, name, Float32(child, keep=False))
            elif child in kept:
                setattr(parent, name, Float32(child, keep=True))
    detector.compute_dtype = torch.float16
    detector.rpn.nms.counts = detector.box_head.nms.counts = torch.float16
    return detector


def _last_layers(detector: StaticRCNN) -> set[nn.Module]:
    """The layers that make scores, deltas and heatmaps (mask logits are fp32 anyway), and all inside them."""
    last = [detector.rpn.head.cls_logits, detector.rpn.head.bbox_pred, detector.box_head.predictor]
    if detector.task == "keypoint":
        last.append(detector.keypoint_head.low_resolution)
    return {module for layer in last for module in layer.modules()}

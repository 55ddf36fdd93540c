"""Box arithmetic in float32 under mixed precision.

torchvision decodes boxes, and rounds the annotated ones, in the type of its heads' outputs. Under autocast that type is
half: bfloat16 has 8 significant bits, so a coordinate of 700 px would be known to 4 px.
"""

from typing import Any

from torch import Tensor, nn

HEADS = (
    "rpn.head",
    "roi_heads.box_predictor",
    "roi_heads.mask_predictor",
    "roi_heads.keypoint_predictor",
)


def keep_boxes_in_float32(detector: nn.Module) -> None:
    """Make the last layers of torchvision's detector return float32 whatever they compute in; in place.

    Proposals, regression targets and losses follow. Nothing changes without autocast.
    """
    for name, module in detector.named_modules():
        if name in HEADS:
            module.register_forward_hook(lambda _module, _inputs, outputs: _in_float32(outputs))


def _in_float32(outputs: Any) -> Any:
    """Tensors in float32, also within lists and tuples."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_in_float32(entry) for entry in outputs)

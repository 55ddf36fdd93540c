"""A torch detector at one frame size as a module of fixed shapes, with the model's own resizing inside."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from norton_deploy.export.precision import to_fp16
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.models.detectron2_layers import DetectorTransform

FINITE = "finite"
"""Output: bool [1], whether the scores of proposals and classes are numbers."""


class FrameDetector(nn.Module):
    """Frames uint8 [B, H, W, 3] of one size -> what `StaticRCNN` gives, boxes in pixels of the frame, and `FINITE`.

    What it finds is what the model finds in eager mode, to rounding, where its flags are true.
    """

    scale: Tensor

    def __init__(self, model: Any, frame_size: tuple[int, int], batch: int, float_type: str) -> None:
        """
        Args:
            model: the detector, in evaluation mode; copied.
            frame_size: (height, width) of the frames.
            float_type: fp32, or fp16 (`to_fp16`).
        """
        super().__init__()
        own = copy.deepcopy(model)
        self.transform = own.transform
        device = next(own.parameters()).device
        resized = self.resize(torch.zeros(1, *frame_size, 3, dtype=torch.uint8, device=device))
        height, width = resized.shape[-2:]
        settings = GraphSettings((height, width), batch=batch, target="tensorrt", input_dtype="float32")
        self.detector = StaticRCNN(own, settings)
        if float_type == "fp16":
            to_fp16(self.detector).to(memory_format=torch.channels_last)
        x, y = frame_size[1] / width, frame_size[0] / height
        self.register_buffer("scale", torch.tensor([x, y, x, y]), persistent=False)
        self.to(device)

    def resize(self, frames: Tensor) -> Tensor:
        """Frames -> float32 [B, 3, H', W'], 0..1, as the model's transform resizes them."""
        planes = frames.permute(0, 3, 1, 2).float().div(255)
        return torch.stack([self.transform.resize(image)[0] for image in planes.unbind()])

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """See the class."""
        outputs, stages = self.detector.outputs_and_stages(self.resize(frames))
        outputs["boxes"] = outputs["boxes"] * self.scale
        if "keypoints" in outputs:
            points = outputs["keypoints"]
            outputs["keypoints"] = torch.cat([points[..., :2] * self.scale[:2], points[..., 2:]], dim=-1)
        scores = [value for name, value in stages.items() if name.startswith(("rpn_logits", "class_logits"))]
        outputs[FINITE] = torch.stack([value.isfinite().all() for value in scores]).all().reshape(1)
        return outputs


def can_be_static(model: Any) -> bool:
    """Whether a detector's resizing can be recorded: Pillow's takes its weights from the host."""
    return not (isinstance(model.transform, DetectorTransform) and model.transform.image_resize == "antialiased")

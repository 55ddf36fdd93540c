"""Resizing inside the graph: camera frames of one fixed size, letterboxed into the detector's input.

It repeats OpenCV's fixed-point bilinear resizing of bytes (weights in 2048ths, products cut off, not rounded), so
that the detector sees the same bytes as behind the predictor's own letterbox. Builds of OpenCV that resize
differently (other processors have their own code) may differ from it by one level.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from norton_deploy.errors import UserError
from norton_deploy.export.letterbox import PADDING_COLOUR, Letterbox

WEIGHT_STEPS = 2048
CUT_SUM_OF_ROW = 16
"""OpenCV cuts four bits off the weighted sum along a row ..."""
CUT_PRODUCT = 65536
"""... sixteen off each product with a weight along the column ..."""
CUT_RESULT = 4
"""... and rounds the last two of their sum away."""
LOW_BITS = 32
"""A product of a row's sum and a weight has more bits than float32 holds: the weight is split at this value."""


class Taps(NamedTuple):
    """Attributes: for each output pixel of one axis, the indices of two input pixels and their weights (0..2048)."""

    low: Tensor
    high: Tensor
    low_weight: Tensor
    high_weight: Tensor


class FrameResize(nn.Module):
    """Frames uint8 [B, H, W, 3] -> letterboxed float32 [B, H', W', 3] with whole values 0..255.

    Attributes:
        letterbox: where the frame lies in the result.
    """

    def __init__(self, input_size: tuple[int, int], image_size: tuple[int, int]) -> None:
        """
        Args:
            input_size: (height, width) of the frames.
            image_size: (height, width) of the result.

        Raises:
            UserError: a side is smaller than one pixel.
        """
        super().__init__()
        if min(input_size) < 1:
            raise UserError(f"input_size: expected at least 1 pixel a side, got {input_size[0]}x{input_size[1]}")
        self.letterbox = Letterbox.fit(input_size, image_size)
        height, width = self.letterbox.content_size
        for name, taps in (
            ("row", axis_taps(input_size[0], height, keep_edge_weights=True)),
            ("column", axis_taps(input_size[1], width, keep_edge_weights=False)),
        ):
            for part, values in taps._asdict().items():
                self.register_buffer(f"{name}_{part}", values, persistent=False)
        # Rows of pixels are handled as [3 W] values: engines are slow at weights that repeat every 3 values.
        for part in ("low_weight", "high_weight"):
            self.register_buffer(
                f"column_{part}", self.get_buffer(f"column_{part}").repeat_interleave(3), persistent=False
            )
        colour = torch.tensor(PADDING_COLOUR, dtype=torch.float32).repeat(image_size[1])
        self.register_buffer("row_colour", colour, persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """See the class."""
        letterbox = self.letterbox
        (height, width), (canvas_height, canvas_width) = letterbox.content_size, letterbox.canvas_size
        content = frames.to(torch.float32)
        if letterbox.content_size != letterbox.image_size:
            content = self.resize(content)
        if letterbox.content_size == letterbox.canvas_size:
            return content
        colour = self.get_buffer("row_colour")
        content = content.flatten(2) - colour[: 3 * width]
        canvas = nn.functional.pad(content, (0, 3 * (canvas_width - width), 0, canvas_height - height)) + colour
        return canvas.unflatten(2, (canvas_width, 3))

    def resize(self, frames: Tensor) -> Tensor:
        """Whole values [B, H, W, 3] -> [B, H_content, W_content, 3]."""
        low, high, low_weight, high_weight = (self.get_buffer(f"column_{part}") for part in Taps._fields)
        row_sum = frames.index_select(2, low).flatten(2) * low_weight
        row_sum = row_sum + frames.index_select(2, high).flatten(2) * high_weight
        row_sum = torch.floor(row_sum / CUT_SUM_OF_ROW)
        low, high, low_weight, high_weight = (self.get_buffer(f"row_{part}") for part in Taps._fields)
        result = cut_product(row_sum.index_select(1, low), low_weight[:, None])
        result = result + cut_product(row_sum.index_select(1, high), high_weight[:, None])
        result = torch.floor((result + CUT_RESULT // 2) / CUT_RESULT)
        return result.unflatten(2, (-1, 3))


def cut_product(values: Tensor, weights: Tensor) -> Tensor:
    """floor(values * weights / CUT_PRODUCT) of whole numbers below 2^15 and up to 2048, every step exact in float32."""
    high_weights = torch.floor(weights / LOW_BITS)
    low_weights = weights - high_weights * LOW_BITS
    share = values * (high_weights * (LOW_BITS / CUT_PRODUCT))
    whole = torch.floor(share)
    return whole + torch.floor((share - whole) + values * (low_weights / CUT_PRODUCT))


def axis_taps(source: int, target: int, *, keep_edge_weights: bool) -> Taps:
    """What each of `target` output pixels reads of `source` input pixels.

    Args:
        source, target: sizes in pixels.
        keep_edge_weights: past an edge both taps are the edge pixel; whether their weights stay apart (OpenCV's
            rows, each product of which is cut off) or one has all (its columns).
    """
    position = ((torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5).float()
    low = torch.floor(position)
    share = position - low
    if not keep_edge_weights:
        share = torch.where((low < 0) | (low >= source - 1), 0.0, share)
    low_index = low.clamp(min=0, max=source - 1).to(torch.int64)
    high_index = (low + 1).clamp(min=0, max=source - 1).to(torch.int64)
    weights = [torch.round(part * WEIGHT_STEPS) for part in (1 - share, share)]
    return Taps(low_index, high_index, *weights)

"""Box arithmetic on fixed shapes: decode, clip, size test, IoU, gathering by index; all in fp32.

Limits and weights come as tensors, buffers of whoever calls: a tensor made from numbers on the way is a copy from the
host, which waits for the GPU and which a CUDA graph cannot record.

Boxes are xyxy in pixels of the graph's image. fp32 is not a preference: an area of 800 x 800 overflows fp16.
"""

import torch
from torch import Tensor


def decode_boxes(deltas: Tensor, boxes: Tensor, weights: Tensor, clip: float) -> Tensor:
    """Apply regression deltas to reference boxes, as torchvision's `BoxCoder.decode_single`.

    Args:
        deltas: [..., 4], (dx, dy, dw, dh) scaled by `weights`.
        boxes: [..., 4], the reference boxes.
        weights: [4], the coder's.
        clip: upper limit of dw and dh (`bbox_xform_clip`).

    Returns:
        [..., 4] boxes.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    size = high - low
    scaled = deltas / weights
    centre = scaled[..., :2] * size + (low + 0.5 * size)
    half = 0.5 * (torch.exp(scaled[..., 2:].clamp(max=clip)) * size)
    return torch.cat([centre - half, centre + half], dim=-1)


def box_limits(image_size: tuple[int, int]) -> Tensor:
    """[4], the largest coordinates of a box in an image of `image_size` (height, width)."""
    height, width = image_size
    return torch.tensor([width, height, width, height], dtype=torch.float32)


def clip_boxes(boxes: Tensor, limits: Tensor) -> Tensor:
    """Clip boxes [..., 4] to the image that `limits` (of `box_limits`) belong to."""
    return torch.minimum(boxes.clamp(min=0), limits)


def at_least(boxes: Tensor, min_size: float) -> Tensor:
    """Whether both sides of each box [..., 4] reach `min_size` pixels; bool [...]."""
    shorter_side = (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1)
    return shorter_side >= min_size


def pairwise_iou(boxes: Tensor) -> Tensor:
    """IoU of every pair of `boxes` [..., N, 4]; [..., N, N]. A pair of empty boxes gives 0."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    area = (x2 - x1) * (y2 - y1)

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        inner_high = torch.minimum(high.unsqueeze(-1), high.unsqueeze(-2))
        inner_low = torch.maximum(low.unsqueeze(-1), low.unsqueeze(-2))
        return (inner_high - inner_low).clamp(min=0)

    intersection = overlap(x1, x2) * overlap(y1, y2)
    union = area.unsqueeze(-1) + area.unsqueeze(-2) - intersection
    return intersection / union.clamp(min=torch.finfo(boxes.dtype).tiny)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of `table` [B, N, C] at `index` [B, K] of each image; [B, K, C]. One plain Gather in ONNX."""
    batch, rows, columns = table.shape
    first_row = torch.arange(batch, device=table.device)[:, None] * rows
    flat = (index + first_row if batch > 1 else index).reshape(-1)
    return table.reshape(batch * rows, columns).index_select(0, flat).reshape(batch, index.shape[1], columns)

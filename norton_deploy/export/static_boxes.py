"""Boxes on fixed shapes: decode, clip, size test, IoU, gathering by index, non-maximum suppression; all in fp32.

Limits and weights come as tensors, buffers of whoever calls: a tensor made from numbers on the way is a copy from the
host, which waits for the GPU and which a CUDA graph cannot record.

Boxes are xyxy in pixels of the graph's image. fp32 is not a preference: an area of 800 x 800 overflows fp16.

Greedy suppression has a fixed-point form. With the boxes sorted by score and `over[i, j]` = "i is earlier than
j, overlaps it by more than the threshold and is in the same group", the kept set is the only solution of
`keep[j] = valid[j] and no kept i with over[i, j]`. Iterating from `keep = valid` settles the first n boxes of
every chain after n steps, so it ends, and an iteration that changes nothing proves that the end is reached.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import nms

DEFAULT_ITERATIONS = 24


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


def nms_unrolled(
    boxes: Tensor,
    valid: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    iterations: int,
    counts: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Greedy NMS by a fixed number of fixed-point steps, in standard operators of fixed shape.

    Args:
        boxes: float32 [..., N, 4] xyxy, sorted by falling score.
        valid: bool [..., N]; an entry that is False is not kept and suppresses nothing.
        groups: int [..., N]; only boxes of one group suppress each other. None: all are one group.
        iou_threshold: a box goes when its IoU with an earlier kept box is larger.
        iterations: steps; a box at depth d of a chain of suppressions needs d of them.
        counts: in what suppressors are counted. float16 halves the bytes: it is exact up to 2048, and all that is asked
            of a count is whether it is 0.

    Returns:
        keep bool [..., N], and converged bool []: the last step changed nothing, so `keep` is exact.
    """
    count = boxes.shape[-2]
    earlier = torch.ones(count, count, dtype=torch.bool, device=boxes.device).triu(1)
    over = (pairwise_iou(boxes) > iou_threshold) & earlier
    if groups is not None:
        over = over & (groups.unsqueeze(-1) == groups.unsqueeze(-2))
    suppresses = over.to(counts)
    possible = valid.to(counts)
    keep, previous = possible, possible
    for _ in range(iterations):
        previous = keep
        suppressors = (keep.unsqueeze(-2) @ suppresses).squeeze(-2)
        keep = possible * (suppressors < 0.5).to(counts)
    return keep > 0.5, (keep - previous).abs().sum() < 0.5


@torch.library.custom_op("norton_deploy::nms_keep", mutates_args=())
def nms_native(boxes: Tensor, valid: Tensor, groups: Tensor, group_count: int, iou_threshold: float) -> Tensor:
    """As `nms_unrolled`, exact for any chain, through torchvision here and NonMaxSuppression in ONNX.

    Args:
        boxes: float32 [B, N, 4] xyxy, sorted by falling score.
        valid: bool [B, N].
        groups: int64 [B, N], 0..group_count-1.
        iou_threshold: as in `nms_unrolled`.

    Returns:
        keep bool [B, N].
    """
    keep = torch.zeros_like(valid)
    order = torch.arange(boxes.shape[1], 0, -1, dtype=boxes.dtype, device=boxes.device)
    for image in range(len(boxes)):
        for group in range(group_count):
            chosen = (valid[image] & (groups[image] == group)).nonzero().squeeze(1)
            kept = nms(boxes[image, chosen], order[chosen], iou_threshold)
            keep[image, chosen[kept]] = True
    return keep


@nms_native.register_fake
def _(boxes: Tensor, valid: Tensor, groups: Tensor, group_count: int, iou_threshold: float) -> Tensor:
    return torch.empty_like(valid)


class StaticNMS(nn.Module):
    """Which form of NMS a graph uses: `native` (ONNX NonMaxSuppression, exact) or unrolled fixed point.

    Attributes:
        counts: of the unrolled form, see `nms_unrolled`.
    """

    counts = torch.float32

    def __init__(self, native: bool, iterations: int = DEFAULT_ITERATIONS) -> None:
        super().__init__()
        self.native = native
        self.iterations = iterations

    def forward(
        self, boxes: Tensor, valid: Tensor, groups: Tensor | None, group_count: int, iou_threshold: float
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            boxes: float32 [B, N, 4] xyxy by falling score.
            valid: bool [B, N].
            groups: int64 [B, N], 0..group_count-1, or None for one group.
            iou_threshold: a box goes when its IoU with an earlier kept box of its group is larger.

        Returns:
            keep bool [B, N], and converged bool [] (always True for the native form).
        """
        if not self.native:
            return nms_unrolled(boxes, valid, groups, iou_threshold, self.iterations, self.counts)
        if groups is None:
            groups = torch.zeros_like(valid, dtype=torch.int64)
        keep = nms_native(boxes, valid, groups, group_count, iou_threshold)
        return keep, torch.ones((), dtype=torch.bool, device=boxes.device)

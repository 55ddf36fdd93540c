"""Non-maximum suppression on fixed shapes: which of N sorted boxes stay, as a mask of N entries.

Greedy suppression has a fixed-point form. With the boxes sorted by score and `over[i, j]` = "i is earlier than
j, overlaps it by more than the threshold and is in the same group", the kept set is the only solution of
`keep[j] = valid[j] and no kept i with over[i, j]`. Iterating from `keep = valid` settles the first n boxes of
every chain after n steps, so it ends, and an iteration that changes nothing proves that the end is reached.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from norton_deploy.export.static_boxes import pairwise_iou

DEFAULT_ITERATIONS = 24


def nms_unrolled(
    boxes: Tensor, valid: Tensor, groups: Tensor | None, iou_threshold: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Greedy NMS by a fixed number of fixed-point steps, in standard operators of fixed shape.

    Args:
        boxes: float32 [..., N, 4] xyxy, sorted by falling score.
        valid: bool [..., N]; an entry that is False is not kept and suppresses nothing.
        groups: int [..., N]; only boxes of one group suppress each other. None: all are one group.
        iou_threshold: a box goes when its IoU with an earlier kept box is larger.
        iterations: steps; a box at depth d of a chain of suppressions needs d of them.

    Returns:
        keep bool [..., N], and converged bool []: the last step changed nothing, so `keep` is exact.
    """
    count = boxes.shape[-2]
    earlier = torch.ones(count, count, dtype=torch.bool, device=boxes.device).triu(1)
    over = (pairwise_iou(boxes) > iou_threshold) & earlier
    if groups is not None:
        over = over & (groups.unsqueeze(-1) == groups.unsqueeze(-2))
    suppresses = over.to(torch.float32)
    possible = valid.to(torch.float32)
    keep, previous = possible, possible
    for _ in range(iterations):
        previous = keep
        suppressors = (keep.unsqueeze(-2) @ suppresses).squeeze(-2)
        keep = possible * (suppressors < 0.5).to(torch.float32)
    return keep > 0.5, (keep - previous).abs().sum() < 0.5


@torch.library.custom_op("norton_deploy::nms_keep", mutates_args=())
def nms_native(boxes: Tensor, valid: Tensor, groups: Tensor, group_count: int, iou_threshold: float) -> Tensor:
    """As `nms_unrolled`, exact for any chain, through torchvision here and NonMaxSuppression in ONNX.

    Args:
        boxes: float32 [B, N, 4] xyxy, sorted by falling score.
        valid: bool [B, N].
        groups: int64 [B, N], 0..group_count-1.
        group_count: number of groups.
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
    """Which form of NMS a graph uses: `native` (ONNX NonMaxSuppression, exact) or unrolled fixed point."""

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
            group_count: number of groups.
            iou_threshold: a box goes when its IoU with an earlier kept box of its group is larger.

        Returns:
            keep bool [B, N], and converged bool [] (always True for the native form).
        """
        if not self.native:
            return nms_unrolled(boxes, valid, groups, iou_threshold, self.iterations)
        if groups is None:
            groups = torch.zeros_like(valid, dtype=torch.int64)
        keep = nms_native(boxes, valid, groups, group_count, iou_threshold)
        return keep, torch.ones((), dtype=torch.bool, device=boxes.device)

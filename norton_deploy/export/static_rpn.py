"""Region proposals on fixed shapes: per level TopK, decode and NMS, then the best of all levels.

Selection follows torchvision's `RegionProposalNetwork.filter_proposals`. NMS runs per level on at most
`pre_nms_top_n` boxes each, so the largest IoU matrix is [levels, 1000, 1000], not [4507, 4507].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from norton_deploy.errors import UserError
from norton_deploy.export.static_boxes import StaticNMS, at_least, box_limits, clip_boxes, decode_boxes, gather_rows

PADDED_LOGIT = -1.0e4
"""Score of a padded row; its box is empty, so `min_size` removes it."""


class StaticRPN(nn.Module):
    """A detector's region proposal network for one padded image size."""

    delta_weights: Tensor
    limits: Tensor

    def __init__(
        self,
        rpn: RegionProposalNetwork,
        feature_sizes: list[tuple[int, int]],
        image_size: tuple[int, int],
        padded_size: tuple[int, int],
        nms: StaticNMS,
    ) -> None:
        """
        Args:
            rpn: the network, in eval mode; its head, anchors, thresholds and counts are used.
            feature_sizes: (height, width) of every feature map, finest first.
            image_size: (height, width) that boxes are clipped to.
            padded_size: (height, width) that the anchors are laid out on.

        Raises:
            UserError: the head does not give one score per anchor.
        """
        super().__init__()
        self.head = rpn.head
        self.nms = nms
        self.largest_log = float(rpn.box_coder.bbox_xform_clip)
        self.register_buffer("delta_weights", torch.tensor(rpn.box_coder.weights), persistent=False)
        self.register_buffer("limits", box_limits(image_size), persistent=False)
        self.nms_thresh = float(rpn.nms_thresh)
        self.score_thresh = float(rpn.score_thresh)
        self.min_size = float(rpn.min_size)
        per_location = rpn.anchor_generator.num_anchors_per_location()
        if len(per_location) != len(feature_sizes):
            raise UserError(
                f"anchors: sizes for {len(per_location)} levels, the backbone gives {len(feature_sizes)} maps"
            )
        image = ImageList(torch.empty(1, 3, *padded_size), [image_size])
        maps = [torch.empty(1, 1, *size) for size in feature_sizes]
        anchors = rpn.anchor_generator(image, maps)[0]
        counts = [count * h * w for count, (h, w) in zip(per_location, feature_sizes, strict=True)]
        for level, part in enumerate(anchors.split(counts)):
            # The first cell's and the stride: all of them would be a fifth of a small detector's file.
            height, width = feature_sizes[level]
            grid = part.reshape(height, width, -1, 4)
            stride = [grid[0, -1, 0, 0] - grid[0, 0, 0, 0], grid[-1, 0, 0, 1] - grid[0, 0, 0, 1]]
            cells = torch.tensor([max(width - 1, 1), max(height - 1, 1)])
            self.register_buffer(f"cell_anchors_{level}", grid[0, 0].clone(), persistent=False)
            self.register_buffer(f"stride_{level}", (torch.stack(stride) / cells).round(), persistent=False)
            assert torch.equal(self.anchors(level, torch.arange(len(part))[None], width)[0], part)
        self.kept_per_level = [min(int(rpn._pre_nms_top_n["testing"]), count) for count in counts]
        self.rows = max(self.kept_per_level)
        self.proposals = min(int(rpn._post_nms_top_n["testing"]), self.rows * len(counts))

    def anchors(self, level: int, index: Tensor, width: int) -> Tensor:
        """Some anchors of a level.

        Args:
            level: the level.
            index: int64 [B, K], in the order of cells by row, all anchors of a cell in a row.
            width: cells of a row.

        Returns:
            float32 [B, K, 4] xyxy.
        """
        of_cell: Tensor = getattr(self, f"cell_anchors_{level}")
        place = index.to(torch.float32)  # exact below 2**24, and so are the floors
        cell = (place / len(of_cell)).floor()
        row = (cell / width).floor()
        corner = torch.stack([cell - row * width, row], dim=-1) * getattr(self, f"stride_{level}")
        chosen = of_cell.index_select(0, (place - cell * len(of_cell)).to(torch.int64).reshape(-1))
        return chosen.reshape(*index.shape, 4) + torch.cat([corner, corner], dim=-1)

    def select(self, logits: list[Tensor], deltas: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            logits: per level [B, A, H, W], the head's scores.
            deltas: per level [B, A * 4, H, W], the head's regression deltas.

        Returns:
            proposals float32 [B, P, 4] xyxy by falling score, their validity bool [B, P] (padding is False,
            its boxes are 0), and whether NMS converged, bool [].
        """
        boxes, scores, valid = self.candidates(logits, deltas)
        batch, levels, rows = scores.shape
        keep, converged = self.nms(
            boxes.reshape(batch * levels, rows, 4),
            valid.reshape(batch * levels, rows),
            None,
            1,
            self.nms_thresh,
        )
        ranking = torch.where(keep.reshape(batch, levels * rows), scores.reshape(batch, -1), -1.0)
        best, index = ranking.topk(self.proposals, dim=1)
        kept = best >= 0
        proposals = gather_rows(boxes.reshape(batch, levels * rows, 4), index)
        return proposals * kept[..., None].to(proposals.dtype), kept, converged

    def candidates(self, logits: list[Tensor], deltas: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The best anchors of each level, decoded and clipped, each level padded to the same number of rows.

        Args:
            logits: per level [B, A, H, W].
            deltas: per level [B, A * 4, H, W].

        Returns:
            boxes float32 [B, L, K, 4], scores float32 [B, L, K] falling along K, valid bool [B, L, K].
        """
        batch = logits[0].shape[0]
        best, chosen, anchors = [], [], []
        for level, (level_logits, level_deltas) in enumerate(zip(logits, deltas, strict=True)):
            per_cell, height, width = level_logits.shape[1:]
            by_anchor = level_logits.permute(0, 2, 3, 1).reshape(batch, -1).to(torch.float32)
            table = level_deltas.reshape(batch, per_cell, 4, height, width).permute(0, 3, 4, 1, 2)
            count = self.kept_per_level[level]
            padding = self.rows - count
            level_best, index = by_anchor.topk(count, dim=1)
            level_chosen = gather_rows(table.reshape(batch, -1, 4), index).to(torch.float32)
            best.append(F.pad(level_best, (0, padding), value=PADDED_LOGIT))
            chosen.append(F.pad(level_chosen, (0, 0, 0, padding)))
            anchors.append(F.pad(self.anchors(level, index, width), (0, 0, 0, padding)))
        decoded = decode_boxes(torch.stack(chosen, 1), torch.stack(anchors, 1), self.delta_weights, self.largest_log)
        boxes = clip_boxes(decoded, self.limits)
        scores = torch.sigmoid(torch.stack(best, dim=1))
        return boxes, scores, at_least(boxes, self.min_size) & (scores >= self.score_thresh)

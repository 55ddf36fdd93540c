"""The heads on fixed shapes: boxes, masks, keypoints.

Selection of detections follows torchvision's `RoIHeads.postprocess_detections`, but ranks before it decodes: only the
`candidates` best (proposal, class) pairs are decoded and suppressed. That is exact when all pairs above the
score threshold are among them, or when they alone fill the detections; a flag says whether it was.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from norton_deploy.errors import UserError
from norton_deploy.export.heatmap_argmax import best_pixel
from norton_deploy.export.heatmap_axis import Tables, search_tables
from norton_deploy.export.static_boxes import StaticNMS, at_least, box_limits, clip_boxes, decode_boxes, gather_rows
from norton_deploy.models.detectron2_layers import NormalisedKeypointPredictor

MIN_BOX_SIZE = 1e-2
"""Side in pixels below which torchvision drops a detection (a constant in `postprocess_detections`)."""
UP_SCALE = 2
"""How much torchvision's predictor enlarges its maps; the search for the best pixel is made for it."""


class ChannelsLastMLPHead(nn.Module):
    """torchvision's `TwoMLPHead` for channels-last input: fc6's columns are permuted, nothing is transposed."""

    def __init__(self, head: TwoMLPHead, pooled_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = pooled_size
        self.fc6, self.fc7 = copy.deepcopy(head.fc6), copy.deepcopy(head.fc7)
        outputs, inputs = head.fc6.weight.shape
        weight = head.fc6.weight.reshape(outputs, inputs // (height * width), height, width)
        self.fc6.weight = nn.Parameter(weight.permute(0, 2, 3, 1).reshape(outputs, inputs).contiguous(), False)

    def forward(self, pooled: Tensor) -> Tensor:
        """[N, P_h, P_w, C] -> [N, F]."""
        return torch.relu(self.fc7(torch.relu(self.fc6(pooled.flatten(1)))))


class ChannelsFirstHead(nn.Module):
    """Any other box head, given the NCHW input that it expects."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, pooled: Tensor) -> Tensor:
        """[N, P_h, P_w, C] -> [N, F]."""
        result: Tensor = self.head(pooled.permute(0, 3, 1, 2))
        return result


class StaticBoxHead(nn.Module):
    """Class scores and boxes of all proposals, reduced to `max_detections` per image."""

    delta_weights: Tensor
    limits: Tensor

    def __init__(
        self,
        roi_heads: RoIHeads,
        pooled_size: tuple[int, int],
        image_size: tuple[int, int],
        max_detections: int,
        candidates: int,
        nms: StaticNMS,
    ) -> None:
        """
        Args:
            roi_heads: supplies head, predictor, coder and thresholds.
            pooled_size: (height, width) of the pooled RoIs.
            image_size: (height, width) that boxes are clipped to.
            max_detections: D, detections per image.
            candidates: M, (proposal, class) pairs that are decoded, at most.
        """
        super().__init__()
        head = roi_heads.box_head
        is_mlp = isinstance(head, TwoMLPHead)
        self.head = ChannelsLastMLPHead(head, pooled_size) if is_mlp else ChannelsFirstHead(head)
        self.predictor = roi_heads.box_predictor
        self.largest_log = float(roi_heads.box_coder.bbox_xform_clip)
        self.register_buffer("delta_weights", torch.tensor(roi_heads.box_coder.weights), persistent=False)
        self.register_buffer("limits", box_limits(image_size), persistent=False)
        self.score_thresh = float(roi_heads.score_thresh)
        self.nms_thresh = float(roi_heads.nms_thresh)
        self.max_detections = max_detections
        self.candidates = candidates
        self.nms = nms

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled RoIs [N, P_h, P_w, C] -> class logits [N, classes] and deltas [N, classes * 4], float32."""
        logits, deltas = self.predictor(self.head(pooled))
        return logits.to(torch.float32), deltas.to(torch.float32)

    def detections(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, proposal_valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            logits: float32 [B * P, classes].
            deltas: float32 [B * P, classes * 4].
            proposals: float32 [B, P, 4].
            proposal_valid: bool [B, P].

        Returns:
            boxes float32 [B, D, 4], scores float32 [B, D] falling, labels int64 [B, D] (all 0 in padded rows),
            nms_converged bool [], candidates_complete bool [].
        """
        batch, count = proposal_valid.shape
        classes = logits.shape[1]
        foreground = classes - 1
        scores = torch.softmax(logits, dim=-1)[:, 1:].reshape(batch, count, foreground)
        above = (scores > self.score_thresh) & proposal_valid[..., None]
        ranking = torch.where(above, scores, -1.0).reshape(batch, count * foreground)
        best, index = ranking.topk(min(self.candidates, count * foreground), dim=1)
        proposal = torch.div(index, foreground, rounding_mode="floor")
        label = index - proposal * foreground + 1
        chosen = gather_rows(deltas.reshape(batch, count * classes, 4), proposal * classes + label)
        reference = gather_rows(proposals, proposal)
        decoded = decode_boxes(chosen, reference, self.delta_weights, self.largest_log)
        boxes = clip_boxes(decoded, self.limits)
        valid = (best > self.score_thresh) & at_least(boxes, MIN_BOX_SIZE)
        keep, converged = self.nms(boxes, valid, label - 1, foreground, self.nms_thresh)

        rows = min(self.max_detections, best.shape[1])
        final, order = torch.where(keep, best, -1.0).topk(rows, dim=1)
        found = final > self.score_thresh
        boxes = gather_rows(boxes, order) * found[..., None].to(boxes.dtype)
        labels = torch.where(found, label.gather(1, order), 0)
        scores = torch.where(found, final, 0.0)
        all_ranked = above.to(torch.float32).sum(dim=(1, 2)) <= best.shape[1]
        filled = keep.to(torch.float32).sum(dim=1) >= self.max_detections
        complete = (~(all_ranked | filled)).to(torch.float32).sum() < 0.5
        padding = self.max_detections - rows
        if padding:
            boxes = torch.nn.functional.pad(boxes, (0, 0, 0, padding))
            scores, labels = (torch.nn.functional.pad(part, (0, padding)) for part in (scores, labels))
        return boxes, scores, labels, converged, complete


class StaticMaskHead(nn.Module):
    """Mask head and predictor; the last 1x1 convolution is evaluated for the detected class only.

    torchvision computes a mask for every class and then picks one. With 91 classes that is 90 masks too many,
    so each RoI here gathers its class's row of the last layer instead. Probabilities are pasted into the image
    on the host (`norton_deploy.inference.static_graph`).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, roi_heads: RoIHeads) -> None:
        """
        Args:
            roi_heads: supplies the mask head and predictor.

        Raises:
            UserError: the predictor does not end with a 1x1 convolution.
        """
        super().__init__()
        *body, last = roi_heads.mask_predictor.children()
        if not isinstance(last, nn.Conv2d) or last.kernel_size != (1, 1) or last.groups != 1:
            raise UserError(
                "mask predictor: expected a 1x1 convolution as its last layer (torchvision's MaskRCNNPredictor), "
                f"found {type(last).__name__}"
            )
        self.head = roi_heads.mask_head
        self.body = nn.Sequential(*body)
        bias = torch.zeros(last.out_channels) if last.bias is None else last.bias
        self.register_buffer("weight", last.weight.detach().flatten(1).clone(), persistent=False)
        self.register_buffer("bias", bias.detach().clone(), persistent=False)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            pooled: [N, P_h, P_w, C].
            labels: int64 [N], model labels.

        Returns:
            float32 [N, M, M], probability of each pixel of the box.
        """
        features = self.body(self.head(pooled.permute(0, 3, 1, 2))).to(torch.float32)
        count, channels, height, width = features.shape
        weight = self.weight.index_select(0, labels)
        logits = torch.bmm(weight[:, None], features.reshape(count, channels, height * width))
        logits = logits + self.bias.index_select(0, labels)[:, None, None]
        return torch.sigmoid(logits).reshape(count, height, width)


class StaticKeypointHead(nn.Module):
    """Keypoint head and predictor, and the decoding of their heatmaps.

    It works on the predictor's maps before they are doubled: the heatmaps themselves are never needed.
    """

    def __init__(self, roi_heads: RoIHeads, image_size: tuple[int, int], map_size: int = 28) -> None:
        """
        Args:
            roi_heads: supplies the keypoint head and predictor.
            image_size: (height, width) in pixels; no RoI is larger.
            map_size: S, side of the maps that the head makes, torchvision's by default.

        Raises:
            UserError: the predictor is not torchvision's.
        """
        super().__init__()
        predictor = roi_heads.keypoint_predictor
        if not isinstance(predictor, KeypointRCNNPredictor):
            raise UserError(
                f"keypoint predictor: expected torchvision's KeypointRCNNPredictor, found {type(predictor).__name__}"
            )
        if predictor.up_scale != UP_SCALE:
            raise UserError(f"keypoint predictor: up_scale is {predictor.up_scale}, expected {UP_SCALE}")
        self.head = roi_heads.keypoint_head
        self.by_probability = isinstance(predictor, NormalisedKeypointPredictor)
        self.low_resolution = predictor.kps_score_lowres
        self.largest_side = max(image_size)
        for name, table in search_tables(map_size)._asdict().items():
            self.register_buffer(f"table_{name}", table, persistent=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled RoIs [N, P_h, P_w, C] -> maps float32 [N, K, S, S], half as fine as the heatmaps."""
        maps: Tensor = self.low_resolution(self.head(pooled.permute(0, 3, 1, 2))).to(torch.float32)
        if self.by_probability:
            maps = maps - self.heatmaps(maps).flatten(2).logsumexp(dim=2)[:, :, None, None]
        return maps

    def heatmaps(self, maps: Tensor) -> Tensor:
        """Maps [N, K, S, S] of `forward` -> what torchvision's predictor returns, [N, K, 2 S, 2 S]."""
        return F.interpolate(
            maps, scale_factor=float(UP_SCALE), mode="bilinear", align_corners=False, recompute_scale_factor=False
        )

    def keypoints(self, maps: Tensor, boxes: Tensor) -> Tensor:
        """Decode maps, as torchvision's `heatmaps_to_keypoints` decodes `heatmaps(maps)`.

        Args:
            maps: float32 [N, K, S, S] of `forward`.
            boxes: float32 [N, 4] xyxy in pixels.

        Returns:
            float32 [N, K, 3]: x, y in pixels and the heatmap's value there, or the probability that it stands for.
        """
        x1, y1, x2, y2 = boxes[:, None, :].unbind(-1)
        width, height = (x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1)
        columns, rows = torch.ceil(width), torch.ceil(height)
        tables = Tables(*(self.get_buffer(f"table_{name}") for name in Tables._fields))
        x, y, score = best_pixel(maps, columns[:, 0], rows[:, 0], self.largest_side, tables=tables)
        x = (x + 0.5) * (width / columns) + x1
        y = (y + 0.5) * (height / rows) + y1
        return torch.stack([x, y, score.exp() if self.by_probability else score], dim=-1)

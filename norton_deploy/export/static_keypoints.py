"""The keypoint head on fixed shapes, with torchvision's decoding: the best pixel of a bicubically resized heatmap."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from norton_deploy.errors import UserError
from norton_deploy.export.heatmap_argmax import Tables, best_pixel, search_tables
from norton_deploy.models.keypoint_predictor import NormalisedKeypointPredictor

UP_SCALE = 2
"""How much torchvision's predictor enlarges its maps; the search for the best pixel is made for it."""


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

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from norton_deploy.errors import UserError
from norton_deploy.export.static_heads import StaticKeypointHead


def head(image_size: tuple[int, int], predictor: nn.Module | None = None) -> StaticKeypointHead:
    heads = SimpleNamespace(keypoint_head=nn.Identity(), keypoint_predictor=predictor or KeypointRCNNPredictor(4, 3))
    return StaticKeypointHead(heads, image_size)  # type: ignore[arg-type]


def boxes_of_all_sizes(count: int, side: float) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    low = torch.rand(count, 2, generator=generator) * 50
    size = torch.rand(count, 2, generator=generator) ** 2 * side
    boxes = torch.cat([low, low + size], dim=1)
    boxes[0, 2:] = boxes[0, :2] + 0.3  # below one pixel, where torchvision takes one
    boxes[1, 2:] = boxes[1, :2] + torch.tensor([28.0, 29.0])  # where a block is no longer one pixel
    boxes[2, 2:] = boxes[2, :2] + torch.tensor([84.0, 85.0])  # where pixels give way to bounds
    boxes[3, 2:] = boxes[3, :2] + side
    return boxes


def test_same_keypoints_as_torchvision() -> None:
    maps = torch.randn(36, 17, 28, 28, generator=torch.Generator().manual_seed(3))
    boxes = boxes_of_all_sizes(36, 500.0)
    static = head((600, 600))
    points, scores = heatmaps_to_keypoints(static.heatmaps(maps), boxes)
    found = static.keypoints(maps, boxes)
    torch.testing.assert_close(found[..., 2], scores, atol=2e-5, rtol=0)
    distance = (found[..., :2] - points[..., :2]).norm(dim=-1)
    assert float(distance.max()) < 0.01


def test_the_predictors_own_heatmaps() -> None:
    predictor = KeypointRCNNPredictor(8, 5)
    static = head((64, 64), predictor)
    pooled = torch.randn(3, 14, 14, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(static.heatmaps(static(pooled)), predictor(pooled.permute(0, 3, 1, 2)))


def test_a_foreign_predictor_is_refused() -> None:
    with pytest.raises(UserError, match="KeypointRCNNPredictor"):
        head((100, 100), nn.Conv2d(3, 3, 1))


def test_another_enlargement_is_refused() -> None:
    predictor = KeypointRCNNPredictor(4, 3)
    predictor.up_scale = 4
    with pytest.raises(UserError, match="up_scale is 4, expected 2"):
        head((100, 100), predictor)

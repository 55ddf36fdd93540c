from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from norton_deploy.errors import UserError
from norton_deploy.export.static_keypoints import BORDER, StaticKeypointHead, cubic_weights


def head(image_size: tuple[int, int], predictor: nn.Module | None = None, **settings: int) -> StaticKeypointHead:
    heads = SimpleNamespace(keypoint_head=nn.Identity(), keypoint_predictor=predictor or KeypointRCNNPredictor(4, 3))
    return StaticKeypointHead(heads, image_size, **settings)  # type: ignore[arg-type]


def peaked_heatmaps(count: int, keypoints: int) -> Tensor:
    """Noise with several peaks, upsampled as the predictor does."""
    noise = torch.randn(count, keypoints, 28, 28, generator=torch.Generator().manual_seed(3))
    return nn.functional.interpolate(noise, scale_factor=2, mode="bilinear", align_corners=False)


def boxes_of_all_sizes(count: int, side: float) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    low = torch.rand(count, 2, generator=generator) * 50
    size = torch.rand(count, 2, generator=generator) ** 2 * side
    boxes = torch.cat([low, low + size], dim=1)
    boxes[0, 2:] = boxes[0, :2] + 0.3  # below one pixel, where torchvision takes one
    boxes[1, 2:] = boxes[1, :2] + torch.tensor([112.0, 113.0])  # where the coarse step begins
    return boxes


def test_same_pixels_as_torchvision() -> None:
    """Where they may differ (see the module): never in these 612 heatmaps, 510 of them larger than 112 px."""
    heatmaps, boxes = peaked_heatmaps(36, 17), boxes_of_all_sizes(36, 500.0)
    points, scores = heatmaps_to_keypoints(heatmaps, boxes)
    found = head((600, 600)).keypoints(heatmaps, boxes)
    distance = (found[..., :2] - points[..., :2]).norm(dim=-1)
    assert int((distance > 0.01).sum()) == 0
    torch.testing.assert_close(found[..., 2], scores, atol=1e-4, rtol=1e-4)


def test_where_the_search_differs_from_torchvision() -> None:
    """On white noise at full resolution, which the predictor's last 2x upsampling never gives: 2 of 612."""
    heatmaps = torch.randn(36, 17, 56, 56, generator=torch.Generator().manual_seed(5))
    boxes = boxes_of_all_sizes(36, 500.0)
    points, scores = heatmaps_to_keypoints(heatmaps, boxes)
    found = head((600, 600)).keypoints(heatmaps, boxes)
    wrong = (found[..., :2] - points[..., :2]).norm(dim=-1) > 0.01
    assert 0 < int(wrong.sum()) <= 4
    assert bool((found[..., 2][wrong] < scores[wrong]).all())


def test_small_images_have_no_coarse_step() -> None:
    heatmaps = torch.randn(36, 17, 56, 56, generator=torch.Generator().manual_seed(5))
    boxes = boxes_of_all_sizes(36, 150.0)
    points, _ = heatmaps_to_keypoints(heatmaps, boxes)
    found = head((192, 224)).keypoints(heatmaps, boxes)
    assert float((found[..., :2] - points[..., :2]).norm(dim=-1).max()) < 0.01


def test_too_coarse_a_search_is_what_the_test_above_would_catch() -> None:
    heatmaps, boxes = peaked_heatmaps(36, 17), boxes_of_all_sizes(36, 500.0)
    points, _ = heatmaps_to_keypoints(heatmaps, boxes)
    found = head((600, 600), coarse=14, peaks=1).keypoints(heatmaps, boxes)
    assert int(((found[..., :2] - points[..., :2]).norm(dim=-1) > 1).sum()) > 10


@pytest.mark.parametrize(("source", "target"), [(56, 130), (56, 17), (5, 9)])
def test_cubic_weights_are_the_bicubic_resize(source: int, target: int) -> None:
    signal = torch.randn(1, 1, source, 1, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.interpolate(signal, size=(target, 1), mode="bicubic", align_corners=False)
    pixels = torch.arange(target, dtype=torch.float32)[None]
    weights = cubic_weights(pixels, torch.tensor([[float(target)]]), source)[0]
    extended = nn.functional.pad(signal, (0, 0, BORDER, BORDER), mode="replicate")[0, 0]
    torch.testing.assert_close(weights @ extended, expected[0, 0], atol=1e-5, rtol=1e-5)


def test_a_foreign_predictor_is_refused() -> None:
    with pytest.raises(UserError, match="KeypointRCNNPredictor"):
        head((100, 100), nn.Conv2d(3, 3, 1))

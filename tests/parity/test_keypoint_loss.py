"""A keypoint is judged by what its heatmap loses there."""

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from norton_deploy.parity.keypoint_loss import keypoint_loss

BOX = np.array([[10.0, 20.0, 18.0, 28.0]], np.float32)  # one pixel per cell


def heatmaps(*peaks: tuple[int, int, float]) -> np.ndarray:
    """One heatmap [1, 1, 8, 8] with narrow peaks at (row, column) of a height."""
    maps = np.zeros((1, 1, 8, 8), np.float32)
    for row, column, height in peaks:
        maps[0, 0, row, column] = height
    return maps


def at(row: float, column: float) -> np.ndarray:
    return np.array([[[10 + column + 0.5, 20 + row + 0.5]]], np.float32)


def test_loss_distance_and_value_at_the_nearest_pixel() -> None:
    judged = keypoint_loss(heatmaps((1, 2, 1.0), (5, 6, 0.75)), BOX, at(5, 6))
    assert judged.loss.item() == pytest.approx(0.25) and judged.value.item() == pytest.approx(0.75)
    assert judged.distance_px.item() == pytest.approx(4 * 2**0.5) and judged.off_grid_px.item() < 1e-5


def test_equal_peaks_are_equally_right_and_nearly_equal_ones_lose_little() -> None:
    for row, column in ((1, 2), (6, 6)):
        assert keypoint_loss(heatmaps((1, 2, 1.0), (6, 6, 1.0)), BOX, at(row, column)).loss.item() < 1e-6
    nearly = keypoint_loss(heatmaps((1, 2, 1.0), (6, 6, 0.9995)), BOX, at(6, 6))
    assert 4e-4 < nearly.loss.item() < 1e-3 and nearly.distance_px.item() > 6


def test_a_point_between_pixels_is_off_the_grid() -> None:
    judged = keypoint_loss(heatmaps((1, 2, 1.0)), BOX, at(1, 2) + np.float32([0.3, 0.4]))
    assert judged.loss.item() < 1e-6 and judged.off_grid_px.item() == pytest.approx(0.5, abs=1e-5)


def test_a_flat_heatmap_takes_any_pixel() -> None:
    assert keypoint_loss(np.full((1, 1, 8, 8), -7.0, np.float32), BOX, at(7, 7)).loss.item() < 1e-4


def test_torchvisions_own_keypoints_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 3, 56, 56, generator=generator)
    corners = torch.rand(6, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(6, 2, generator=generator) * 300], dim=1)
    boxes[0, 2:] = boxes[0, :2] + 0.3  # smaller than a pixel
    points, scores = heatmaps_to_keypoints(maps, boxes)
    judged = keypoint_loss(maps.numpy(), boxes.numpy(), points[..., :2].numpy())
    assert judged.loss.max() < 1e-6 and judged.off_grid_px.max() < 1e-3
    np.testing.assert_allclose(judged.value, scores.numpy(), atol=1e-5)
    wrong = keypoint_loss(maps.numpy(), boxes.numpy(), points[..., :2].numpy() + np.float32([3, 0]))
    assert np.median(wrong.loss[1:]) > 1e-3

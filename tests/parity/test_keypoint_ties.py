import numpy as np

from norton_deploy.parity.comparison import keypoint_distances


def heatmaps(*peaks: tuple[int, int]) -> np.ndarray:
    """One heatmap [1, 1, 8, 8] with equal narrow peaks at (row, column)."""
    maps = np.zeros((1, 1, 8, 8), np.float32)
    for row, column in peaks:
        maps[0, 0, row, column] = 1.0
    return maps


BOX = np.array([[10.0, 20.0, 18.0, 28.0]], np.float32)  # one pixel per cell


def test_distance_to_a_single_peak_is_euclidean() -> None:
    points = np.array([[[10 + 2.5 + 3, 20 + 1.5 + 4]]], np.float32)
    distance, ambiguous = keypoint_distances(heatmaps((1, 2)), BOX, points, 1.0)
    assert distance[0, 0] == 5.0 and not ambiguous[0, 0]


def test_either_of_two_equal_peaks_is_right() -> None:
    for row, column in ((1, 2), (6, 6)):
        points = np.array([[[10 + column + 0.5, 20 + row + 0.5]]], np.float32)
        distance, ambiguous = keypoint_distances(heatmaps((1, 2), (6, 6)), BOX, points, 1.0)
        assert distance[0, 0] == 0.0 and ambiguous[0, 0]


def test_a_flat_heatmap_takes_any_pixel() -> None:
    flat = np.full((1, 1, 8, 8), -7.0, np.float32)
    distance, ambiguous = keypoint_distances(flat, BOX, np.array([[[17.5, 27.5]]], np.float32), 1.0)
    assert distance[0, 0] == 0.0 and ambiguous[0, 0]


def test_a_lower_peak_is_wrong() -> None:
    maps = heatmaps((1, 2), (6, 6))
    for lower, several in ((0.99, False), (0.999, True)):
        maps[0, 0, 6, 6] = lower
        distance, ambiguous = keypoint_distances(maps, BOX, np.array([[[16.5, 26.5]]], np.float32), 1.0)
        assert distance[0, 0] > 6 and ambiguous[0, 0] == several

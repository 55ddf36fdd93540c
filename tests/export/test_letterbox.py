"""Letterbox geometry against closed forms."""

import numpy as np
import pytest

from norton_deploy.errors import UserError
from norton_deploy.export.letterbox import PADDING_COLOUR, Letterbox, clip_boxes, letterboxed, place_images


@pytest.mark.parametrize(
    ("image_size", "canvas_size", "content_size"),
    [
        ((480, 640), (800, 800), (600, 800)),
        ((640, 480), (800, 800), (800, 600)),
        ((800, 800), (800, 800), (800, 800)),
        ((1, 1000), (100, 100), (1, 100)),
        ((10, 10), (30, 50), (30, 30)),
    ],
)
def test_content_is_the_largest_that_fits(image_size, canvas_size, content_size):
    assert Letterbox.fit(image_size, canvas_size).content_size == content_size


def test_corners_map_to_corners():
    letterbox = Letterbox.fit((333, 1001), (640, 512))
    height, width = letterbox.content_size
    corners = letterbox.boxes_to_image(np.array([[0, 0, width, height]], np.float32))
    np.testing.assert_allclose(corners, [[0, 0, 1001, 333]], rtol=1e-6)
    points = letterbox.keypoints_to_image(np.array([[[width, height, 0.7]]], np.float32))
    np.testing.assert_allclose(points, [[[1001, 333, 0.7]]], rtol=1e-6)


def test_padding_is_on_the_right_and_below_and_content_is_kept():
    image = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    canvas = np.zeros((6, 8, 3), np.uint8)
    Letterbox.fit((4, 8), (6, 8)).place(image, canvas)
    np.testing.assert_array_equal(canvas[:4], image)
    assert (canvas[4:] == PADDING_COLOUR).all()
    canvas = np.zeros((4, 9, 3), np.uint8)
    Letterbox.fit((4, 8), (4, 9)).place(image, canvas)
    assert (canvas[:, 8] == PADDING_COLOUR).all()


def test_resizing_agrees_with_torchvisions():
    import torch

    image = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    letterbox = Letterbox.fit((37, 53), (64, 80))
    canvas = np.zeros((64, 80, 3), np.uint8)
    letterbox.place(image, canvas)
    height, width = letterbox.content_size
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False)
    difference = np.abs(canvas[:height, :width] - expected[0].permute(1, 2, 0).numpy())
    assert difference.max() < 1.01  # rounding to bytes, nothing more


def test_empty_images_are_refused_and_boxes_clipped():
    with pytest.raises(UserError, match="empty"):
        Letterbox.fit((0, 5), (10, 10))
    boxes = np.array([[-3, -4, 20, 30], [1, 2, 3, 4]], np.float32)
    np.testing.assert_array_equal(clip_boxes(boxes, (10, 15)), [[0, 0, 15, 10], [1, 2, 3, 4]])


def test_images_are_letterboxed_and_further_canvases_are_blank():
    images = [np.full((10, 20, 3), value, np.uint8) for value in (1, 2, 3)]
    canvases = letterboxed(images[:2], (16, 16))
    assert canvases.shape == (2, 16, 16, 3) and canvases[:, 0, 0, 0].tolist() == [1, 2]
    [letterbox] = place_images(images[2:], canvases)
    assert letterbox.content_size == (8, 16)
    assert canvases[0, 0, 0, 0] == 3 and (canvases[1] == PADDING_COLOUR).all()

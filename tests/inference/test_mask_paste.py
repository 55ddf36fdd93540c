import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from norton_deploy.errors import UserError
from norton_deploy.masks import MasksInBoxes


def random_case(seed: int, count: int, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    height, width = image_size
    centres = generator.uniform((0, 0), (width, height), (count, 2))
    halves = generator.uniform(0.1, max(image_size) / 1.5, (count, 2))
    boxes = np.concatenate([centres - halves, centres + halves], axis=1)
    boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    return generator.uniform(0, 1, (count, 28, 28)).astype(np.float32), boxes


@pytest.mark.parametrize("image_size", [(60, 90), (133, 70)])
def test_equals_torchvision_but_for_rounding_at_the_threshold(image_size: tuple[int, int]) -> None:
    probabilities, boxes = random_case(0, 60, image_size)
    soft = paste_masks_in_image(torch.from_numpy(probabilities)[:, None], torch.from_numpy(boxes), image_size)
    expected = soft[:, 0].numpy()
    ours = MasksInBoxes(probabilities, boxes, image_size).paste()
    assert ours.shape == (60, *image_size) and ours.dtype == np.bool_
    different = ours != (expected > 0.5)
    assert np.all(np.abs(expected[different] - 0.5) < 1e-5)
    assert ours.sum() > 1000


@pytest.mark.parametrize("box", [[-20, -9, 30, 40], [50, 30, 120, 99], [3.2, 4.7, 3.9, 4.8], [0, 0, 90, 60]])
def test_boxes_past_the_border_and_tiny_ones(box: list[float]) -> None:
    probabilities, _ = random_case(1, 1, (60, 90))
    boxes = np.array([box], dtype=np.float32)
    tensors = torch.from_numpy(probabilities)[:, None], torch.from_numpy(boxes)
    expected = paste_masks_in_image(*tensors, (60, 90))[:, 0].numpy() > 0.5
    np.testing.assert_array_equal(MasksInBoxes(probabilities, boxes, (60, 90)).paste(), expected)


def test_a_box_outside_the_image_pastes_nothing() -> None:
    probabilities, _ = random_case(1, 2, (60, 90))
    boxes = np.array([[95, 5, 120, 30], [-40, 2, -20, 9]], dtype=np.float32)
    assert not MasksInBoxes(probabilities, boxes, (60, 90)).paste().any()


def test_no_detections_and_wrong_shapes() -> None:
    empty = MasksInBoxes(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (5, 6)).paste()
    assert empty.shape == (0, 5, 6)
    with pytest.raises(UserError, match=r"\[N, M, M\]"):
        MasksInBoxes(np.zeros((2, 28, 27), np.float32), np.zeros((2, 4), np.float32), (5, 6)).paste()

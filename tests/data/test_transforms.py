"""Flip and photometric jitter on targets whose result is known."""

import numpy as np
import torch
from torch import Tensor

from norton_deploy.data.synthetic.people import KEYPOINTS
from norton_deploy.data.transforms import (
    MIRRORED_KEYPOINTS,
    Compose,
    PhotometricJitter,
    RandomHorizontalFlip,
    Target,
    generator_for,
    training_transform,
)


def example() -> tuple[Tensor, Target]:
    """An image 20 high and 30 wide with one object at x 4..10, y 5..15."""
    image = torch.zeros(3, 20, 30)
    image[:, 5:15, 4:10] = 1.0
    masks = torch.zeros(1, 20, 30, dtype=torch.uint8)
    masks[:, 5:15, 4:10] = 1
    points = torch.zeros(1, 17, 3)
    points[0, 0] = torch.tensor([6.0, 7.0, 2.0])  # nose
    points[0, 5] = torch.tensor([5.0, 9.0, 1.0])  # left shoulder
    return image, {
        "boxes": torch.tensor([[4.0, 5.0, 10.0, 15.0]]),
        "labels": torch.tensor([1]),
        "area": torch.tensor([60.0]),
        "masks": masks,
        "keypoints": points,
        "image_id": 1,
    }


def test_mirrored_keypoints_swap_left_and_right() -> None:
    for index, mirrored in enumerate(MIRRORED_KEYPOINTS):
        swapped = KEYPOINTS[index].replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")
        assert KEYPOINTS[mirrored] == swapped


def test_flip_moves_everything_together() -> None:
    image, target = example()
    flipped, new = RandomHorizontalFlip(1.0)(image, target, generator_for(0, 0, 0))
    assert new["boxes"].tolist() == [[20, 5, 26, 15]]
    assert torch.equal(flipped[0] > 0, new["masks"][0] > 0)
    assert torch.equal(flipped[0, 5:15, 20:26], torch.ones(10, 6))
    assert new["keypoints"][0, 0].tolist() == [24, 7, 2]
    assert new["keypoints"][0, 6].tolist() == [25, 9, 1]  # now the right shoulder
    assert new["keypoints"][0, 5].tolist() == [0, 0, 0]  # not labelled stays at the origin
    again, twice = RandomHorizontalFlip(1.0)(flipped, new, generator_for(0, 0, 0))
    assert torch.equal(again, image)
    for key in ("boxes", "masks", "keypoints"):
        assert torch.equal(twice[key], target[key])
    assert target["boxes"].tolist() == [[4, 5, 10, 15]]  # the given target is left alone


def test_flip_probability() -> None:
    image, target = example()
    flip = RandomHorizontalFlip(0.25)
    flipped = [flip(image, target, generator_for(1, 0, i))[1]["boxes"][0, 0] > 4 for i in range(400)]
    assert 70 <= sum(map(int, flipped)) <= 130
    assert RandomHorizontalFlip(0.0)(image, target, generator_for(0, 0, 0))[0] is image


def test_photometric_jitter_stays_in_range_and_leaves_the_target() -> None:
    image, target = example()
    image = image * 0.5 + torch.linspace(0, 0.5, 30)
    changed = 0
    for index in range(20):
        result, same = PhotometricJitter()(image, target, generator_for(0, 0, index))
        assert float(result.min()) >= 0.0 and float(result.max()) <= 1.0
        assert same is target
        changed += not torch.equal(result, image)
    assert 15 <= changed <= 20  # all four are off once in sixteen


def test_everything_depends_on_seed_epoch_and_image_alone() -> None:
    transform = training_transform(photometric=True)
    assert isinstance(transform, Compose) and len(transform.transforms) == 2

    def run(*key: int) -> Tensor:
        return transform(*example(), generator_for(*key))[0]

    first = run(1, 2, 3)
    np.random.default_rng(0).uniform()
    torch.rand(3)
    assert torch.equal(run(1, 2, 3), first)
    others = [run(0, 2, 3), run(1, 3, 3), run(1, 2, 4)]
    assert all(not torch.equal(other, first) for other in others)

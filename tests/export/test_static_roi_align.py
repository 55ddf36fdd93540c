import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from norton_deploy.errors import UserError
from norton_deploy.export.static_roi_align import StaticRoIAlign

IMAGE_SIZE = (100, 140)
SIZES = {"0": (26, 36), "1": (13, 18), "2": (7, 9), "pool": (4, 5)}


def maps(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, 6, *size, generator=generator) for name, size in SIZES.items()}


def rois(batch: int, count: int) -> Tensor:
    """Boxes of all sizes, some past the border, some empty or thinner than a feature pixel."""
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(batch, count, 2, generator=generator) * 150 - 10
    size = torch.exp(torch.rand(batch, count, 2, generator=generator) * 6) - 1
    boxes = torch.cat([low, low + size], dim=-1)
    boxes[:, 0] = 0
    boxes[:, 1] = torch.tensor([140.0, 100, 140, 100])
    boxes[:, 2] = torch.tensor([139.5, 20, 140, 90])
    return boxes


@pytest.mark.parametrize(("output", "ratio", "chunk"), [(7, 2, 256), ((3, 5), 1, 7), (4, 3, 100)])
def test_equals_torchvision(output: int | tuple[int, int], ratio: int, chunk: int) -> None:
    pooler = MultiScaleRoIAlign(["0", "1", "2"], output, ratio, canonical_scale=56)
    features, boxes = maps(2), rois(2, 60)
    expected = pooler(features, list(boxes), [IMAGE_SIZE] * 2)
    static = StaticRoIAlign(pooler, SIZES, IMAGE_SIZE, chunk=chunk)
    found = static(features, boxes).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert len(static.level_of(boxes).unique()) == 3


def test_levels_at_the_thresholds() -> None:
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 2, 2, canonical_scale=56)
    static = StaticRoIAlign(pooler, SIZES, IMAGE_SIZE)
    pooler(maps(1), [rois(1, 3)[0]], [IMAGE_SIZE])
    sides = torch.tensor([13.9, 14.0, 27.9, 28.0, 28.1, 56.0, 112.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert pooler.map_levels is not None
    assert torch.equal(static.level_of(boxes), pooler.map_levels([boxes]))


def test_one_level_and_wrong_poolers() -> None:
    pooler = MultiScaleRoIAlign(["1"], 3, 2)
    expected = pooler(maps(1), [rois(1, 9)[0]], [IMAGE_SIZE])
    found = StaticRoIAlign(pooler, SIZES, IMAGE_SIZE)(maps(1), rois(1, 9)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    with pytest.raises(UserError, match="sampling ratio"):
        StaticRoIAlign(MultiScaleRoIAlign(["1"], 3, 0), SIZES, IMAGE_SIZE)
    with pytest.raises(UserError, match="no feature map"):
        StaticRoIAlign(MultiScaleRoIAlign(["x"], 3, 2), SIZES, IMAGE_SIZE)

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from norton_deploy.export.heatmap_argmax import best_pixel
from norton_deploy.export.heatmap_axis import BLOCK_HULL, PIECE_HULL, map_weights
from norton_deploy.parity.keypoint_loss import keypoint_loss

SIZE = 28
SIDES = [(1, 1), (2, 7), (13, 200), (28, 29), (40, 60), (84, 85), (86, 300), (113, 97), (333, 250), (800, 640)]


def maps_of(kind: str, count: int, keypoints: int = 17) -> Tensor:
    """noise: the worst a predictor could give; smooth: noise of a head that was hardly trained; peak: one person."""
    generator = torch.Generator().manual_seed(len(kind))
    noise = torch.randn(count, keypoints, SIZE, SIZE, generator=generator)
    if kind == "noise":
        return noise
    if kind == "smooth":
        return 3 * F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="replicate"), 3, 1)
    middle = torch.rand(count, keypoints, 2, generator=generator) * SIZE - 0.5
    width = 0.7 + 2 * torch.rand(count, keypoints, 1, 1, generator=generator)
    at = torch.arange(float(SIZE))
    square = (at - middle[..., :1])[..., None, :] ** 2 + (at - middle[..., 1:])[..., :, None] ** 2
    return 10 * torch.exp(-square / (2 * width**2)) - 5 + 0.3 * noise


def resized(maps: Tensor, rows: int, columns: int) -> Tensor:
    """What torchvision takes the argmax of."""
    heatmaps = F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)
    return F.interpolate(heatmaps, size=(rows, columns), mode="bicubic", align_corners=False)


def search(maps: Tensor, rows: int, columns: int, **limits: int) -> tuple[Tensor, Tensor, Tensor]:
    sides = torch.full((len(maps),), 1.0)
    return best_pixel(maps, sides * columns, sides * rows, 800, **limits)


@pytest.mark.parametrize("kind", ["noise", "smooth", "peak"])
@pytest.mark.parametrize(("rows", "columns"), [*SIDES, *((columns, rows) for rows, columns in SIDES[1:7])])
def test_finds_the_maximum(kind: str, rows: int, columns: int) -> None:
    maps = maps_of(kind, 4)
    x, y, score = search(maps, rows, columns)
    pixels = resized(maps, rows, columns)
    rounding = 5e-6 * float(maps.abs().max())
    torch.testing.assert_close(score, pixels.amax((2, 3)), atol=rounding, rtol=0)
    there = pixels.flatten(2).gather(2, (y * columns + x).to(torch.int64)[..., None])[..., 0]
    torch.testing.assert_close(there, score, atol=rounding, rtol=0)


def test_too_short_a_search_is_what_the_test_above_would_catch() -> None:
    maps = maps_of("noise", 12)
    best = resized(maps, 300, 200).amax((2, 3))
    assert int((search(maps, 300, 200, blocks=1)[2] < best - 1e-3).sum()) > 20
    assert int((search(maps, 300, 200, pieces=1)[2] < best - 1e-3).sum()) > 5


def test_rois_of_different_sizes_in_one_call() -> None:
    maps = maps_of("smooth", len(SIDES), keypoints=2)
    rows, columns = torch.tensor(SIDES, dtype=torch.float32).unbind(1)
    x, y, score = best_pixel(maps, columns, rows, 800)
    for index, (height, width) in enumerate(SIDES):
        one = search(maps[index : index + 1], height, width)
        torch.testing.assert_close(torch.stack([x[index], y[index], score[index]]), torch.stack(one)[:, 0])


@pytest.mark.parametrize("last", [(0, 0), (27, 27), (27, 0)])
def test_maxima_at_the_border(last: tuple[int, int]) -> None:
    maps = torch.zeros(1, 1, SIZE, SIZE)
    maps[0, 0, last[0], last[1]] = 1.0
    for side in (10, 57, 200):
        x, y, score = search(maps, side, side)
        pixels = resized(maps, side, side)
        assert pixels[0, 0, int(y), int(x)] == pytest.approx(float(pixels.max()), abs=1e-6)
        assert float(score) == pytest.approx(float(pixels.max()), abs=1e-6)


def curve(first: float, last: float) -> Tensor:
    """Weights [1001, 4] of the four map values around the interval 0..1, at points of a part of it."""
    places = torch.linspace(first, last, 1001, dtype=torch.float64)
    # On a map of 4 values resized to 4000 pixels, place p between values 1 and 2 is pixel 1000 (p + 1.5) - 0.5.
    weights = map_weights(1000 * (places + 1.5)[None] - 0.5, torch.tensor([[4000.0]], dtype=torch.float64), 4)
    assert float(weights[0, :, [0, 1, 6, 7]].abs().max()) < 1e-9
    return weights[0, :, 2:6]


def test_block_hull_contains_the_curve() -> None:
    shares = curve(0, 1) @ torch.linalg.inv(torch.tensor(BLOCK_HULL, dtype=torch.float64) / 64)
    torch.testing.assert_close(shares.sum(1), torch.ones(1001, dtype=torch.float64))
    assert float(shares.min()) > -1e-9


def test_piece_hull_holds_the_bernstein_coefficients() -> None:
    at = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    bernstein = torch.cat([(1 - at) ** 3, 3 * at * (1 - at) ** 2, 3 * at**2 * (1 - at), at**3], dim=1)
    hull = torch.tensor(PIECE_HULL, dtype=torch.float64) / 64
    for piece, (first, last) in enumerate(((0, 0.25), (0.25, 0.75), (0.75, 1))):
        torch.testing.assert_close(bernstein @ hull[3 * piece : 3 * piece + 4], curve(first, last), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("source", "target"), [(28, 130), (28, 17), (5, 9)])
def test_map_weights_are_the_two_resizes(source: int, target: int) -> None:
    signal = torch.randn(1, 1, source, 1, generator=torch.Generator().manual_seed(0))
    doubled = F.interpolate(signal, size=(2 * source, 1), mode="bilinear", align_corners=False)
    expected = F.interpolate(doubled, size=(target, 1), mode="bicubic", align_corners=False)
    weights = map_weights(torch.arange(float(target))[None], torch.tensor([[float(target)]]), source)[0]
    extended = F.pad(signal, (0, 0, 2, 2), mode="replicate")[0, 0]
    torch.testing.assert_close(weights @ extended, expected[0, 0], atol=1e-5, rtol=1e-5)


class RoundedProducts(TorchDispatchMode):
    """Matrix products as a GPU's TF32 makes them: factors rounded to 10 bits of mantissa, sums in fp32."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            args = tuple(map(to_tf32, args))
        return func(*args, **(kwargs or {}))


def to_tf32(values: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def test_rounding_to_tf32() -> None:
    assert to_tf32(torch.tensor([1 + 2**-10, 1 + 2**-12, 1 + 3 * 2**-12])).tolist() == [1 + 2**-10, 1, 1 + 2**-10]


@pytest.mark.parametrize("kind", ["noise", "smooth", "peaked", "far from zero"])
def test_products_in_tf32_lose_a_thousandth_of_the_range_at_most(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(40, 5, 28, 28, generator=generator)
    if kind == "smooth":
        maps = F.interpolate(maps[..., :5, :5], (28, 28), mode="bicubic")
    if kind == "peaked":
        y, x = torch.rand(2, 40, 5, 1, 1, generator=generator) * 27
        grid = torch.arange(28.0)
        maps = 12 * torch.exp(-((grid[:, None] - y) ** 2 + (grid - x) ** 2) / 8) - 8
    if kind == "far from zero":
        maps = maps - 30
    corners, sides = torch.rand(2, 40, 2, generator=generator) * 280
    boxes = torch.cat([corners, corners + sides + 5], dim=1)
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    with RoundedProducts():
        column, row, score = best_pixel(maps, width.ceil(), height.ceil(), 320)
    points = torch.stack(
        [
            (column + 0.5) * (width / width.ceil())[:, None] + boxes[:, :1],
            (row + 0.5) * (height / height.ceil())[:, None] + boxes[:, 1:2],
        ],
        dim=-1,
    )
    heatmaps = F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)
    judged = keypoint_loss(heatmaps.numpy(), boxes.numpy(), points.numpy())
    assert judged.loss.max() < 1e-3
    assert (np.abs(score.numpy() - judged.value) / judged.spread).max() < 2e-3

"""What synthetic scenes are drawn with: a supersampled patch for each object, colours, noise and backgrounds."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

SUPERSAMPLING = 2
_FRACTION_BITS = 4

Colour = tuple[int, int, int]
Points = npt.NDArray[np.floating]
Field = npt.NDArray[np.float32]


def capsule(start: Points, end: Points, start_radius: float, end_radius: float) -> Points:
    """Outline [P, 2] of a limb: two half discs of different radius joined by straight sides."""
    along = float(np.arctan2(end[1] - start[1], end[0] - start[0]))
    arc = np.linspace(-np.pi / 2, np.pi / 2, 7)
    tip = end + end_radius * np.stack([np.cos(along + arc), np.sin(along + arc)], axis=1)
    tail = start - start_radius * np.stack([np.cos(along + arc), np.sin(along + arc)], axis=1)
    return np.concatenate([tip, tail])


def ellipse(centre: Points, radius_x: float, radius_y: float, angle: float = 0.0, count: int = 40) -> Points:
    """Outline [count, 2] of an ellipse; `angle` in radians turns its x axis."""
    turn = np.linspace(0.0, 2 * np.pi, count, endpoint=False)
    x, y = radius_x * np.cos(turn), radius_y * np.sin(turn)
    return centre + np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1)


@dataclass(frozen=True)
class Layer:
    """One drawn object, ready to be laid over the scene.

    Attributes:
        left, top: position of the patch's first pixel in the image; may be negative.
        colour: float32 [h, w, 3] RGB 0..255, already multiplied by `alpha`.
        alpha: float32 [h, w], 0..1.
        parts: uint8 [h * SUPERSAMPLING, w * SUPERSAMPLING]; 0 where nothing is drawn, else the part's number.
    """

    left: int
    top: int
    colour: npt.NDArray[np.float32]
    alpha: npt.NDArray[np.float32]
    parts: npt.NDArray[np.uint8]


class Canvas:
    """A square patch around `centre`; all coordinates given to it are pixels of the image.

    Args:
        centre: x, y in the image.
        radius: half the side of the patch in pixels; may be (x, y).
    """

    def __init__(self, centre: Points, radius: float | tuple[float, float]) -> None:
        radius_xy = np.broadcast_to(np.asarray(radius, dtype=float), (2,))
        low = np.floor(np.asarray(centre) - radius_xy).astype(int) - 1
        high = np.ceil(np.asarray(centre) + radius_xy).astype(int) + 1
        self.left, self.top = int(low[0]), int(low[1])
        self.width, self.height = (int(side) for side in high - low)
        # The fourth channel holds the part's number, so that one OpenCV call paints colour and part.
        self.pixels = np.zeros((self.height * SUPERSAMPLING, self.width * SUPERSAMPLING, 4), np.uint8)

    def _fixed_point(self, points: Points) -> npt.NDArray[np.int32]:
        # Pixel i of the supersampled patch covers [i, i + 1), OpenCV counts from pixel centres: hence - 0.5.
        local = (np.asarray(points) - (self.left, self.top)) * SUPERSAMPLING - 0.5
        return np.round(local * (1 << _FRACTION_BITS)).astype(np.int32)

    def polygon(self, points: Points, colour: Colour, part: int = 1) -> None:
        """Fill the outline `points` [P, 2]."""
        cv2.fillPoly(self.pixels, [self._fixed_point(points)], (*colour, part), cv2.LINE_8, _FRACTION_BITS)

    def line(self, points: Points, thickness: float, colour: Colour, part: int = 1, *, closed: bool = False) -> None:
        """Draw the polyline `points` [P, 2]; `thickness` in pixels of the image."""
        width = max(1, round(thickness * SUPERSAMPLING))
        fixed = [self._fixed_point(points)]
        cv2.polylines(self.pixels, fixed, closed, (*colour, part), width, cv2.LINE_8, _FRACTION_BITS)

    def part_at(self, point: Points) -> int:
        """Number of the part drawn at x, y; 0 for none or outside the patch."""
        column = int((point[0] - self.left) * SUPERSAMPLING)
        row = int((point[1] - self.top) * SUPERSAMPLING)
        inside = 0 <= row < self.pixels.shape[0] and 0 <= column < self.pixels.shape[1]
        return int(self.pixels[row, column, 3]) if inside else 0

    def stripes(self, part: int, colour: Colour, period: float, angle: float, phase: float = 0.0) -> None:
        """Paint stripes over what is drawn of `part`; `period` in pixels, `angle` in radians."""
        rows, columns = np.nonzero(self.pixels[..., 3] == part)
        across = (columns * np.cos(angle) + rows * np.sin(angle)) / (period * SUPERSAMPLING) + phase
        chosen = across % 1.0 < 0.5
        self.pixels[rows[chosen], columns[chosen], :3] = colour

    def layer(self, shading: npt.NDArray[np.float32] | None = None) -> Layer:
        """Reduce to the image's resolution; `shading` [h, w] multiplies the colours (resized to fit)."""
        size = (self.width, self.height)
        reduced = cv2.resize(self.pixels, size, interpolation=cv2.INTER_AREA)[..., :3].astype(np.float32)
        drawn = np.where(self.pixels[..., 3] > 0, np.uint8(255), np.uint8(0))
        alpha = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0
        if shading is not None:
            reduced *= cv2.resize(shading, size, interpolation=cv2.INTER_CUBIC)[..., None]
        return Layer(self.left, self.top, reduced, alpha, self.pixels[..., 3].copy())


def random_colour(
    rng: np.random.Generator,
    hue: float | None = None,
    saturation: tuple[float, float] = (0.2, 1.0),
    value: tuple[float, float] = (0.25, 1.0),
) -> Colour:
    """A random RGB colour; `hue` 0..1 fixes its hue up to a little spread."""
    chosen = rng.uniform() if hue is None else (hue + 0.035 * rng.normal()) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(chosen, rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * red), round(255 * green), round(255 * blue)


def tint(colour: Colour, factor: float) -> Colour:
    """The same colour darker (`factor` < 1) or lighter (> 1)."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


def value_noise(rng: np.random.Generator, image_size: tuple[int, int], cells: tuple[int, ...]) -> Field:
    """Smooth noise [H, W] of about unit deviation, summed over grids of `cells` cells on the longer side."""
    height, width = image_size
    total = np.zeros(image_size, np.float32)
    for count in cells:
        step = max(height, width) / count
        grid = rng.standard_normal((max(2, round(height / step)), max(2, round(width / step))), np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return total / np.float32(len(cells)) ** np.float32(0.5)


def object_shading(rng: np.random.Generator, contrast: float = 0.10) -> Field:
    """A factor field [12, 12] around 1: light from one side plus a rough surface."""
    y, x = np.mgrid[-1:1:12j, -1:1:12j].astype(np.float32)
    angle = rng.uniform(-np.pi, 0.0)
    light = (x * math.cos(angle) + y * math.sin(angle)) * rng.uniform(0.05, 0.25)
    rough = rng.standard_normal((12, 12), np.float32) * rng.uniform(0.2, 1.0) * contrast
    return np.clip(1.0 + light + rough, 0.4, 1.5).astype(np.float32)


def _pattern(rng: np.random.Generator, image_size: tuple[int, int]) -> Field:
    """Stripes, checks or bricks in -1..1, [H, W]."""
    y, x = np.mgrid[: image_size[0], : image_size[1]].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 40)
    cos, sin = math.cos(angle) / period, math.sin(angle) / period
    u, v = x * cos + y * sin, y * cos - x * sin
    kind = rng.integers(3)
    if kind == 0:
        return np.sin(2 * np.pi * u).astype(np.float32)
    if kind == 1:
        return np.sign(np.sin(np.pi * u) * np.sin(np.pi * v)).astype(np.float32)
    row = np.floor(v * 2)
    mortar = (v * 2 - row < 0.15) | ((u + 0.5 * (row % 2)) % 1.0 < 0.08)
    return np.where(mortar, 1.0, -0.2).astype(np.float32)


def background(rng: np.random.Generator, image_size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A textured background, float32 [H, W, 3] RGB 0..255: two regions, gradients, noise at several scales.

    The regions (above and below a wavy horizon, or two blobs) differ in colour, and each may carry a
    pattern of stripes, checks or bricks.
    """
    height = image_size[0]
    y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None]
    split = value_noise(rng, image_size, (3,))
    if rng.uniform() < 0.7:
        split = y * 4.0 + rng.uniform(-2.0, 2.0) + 0.25 * split
    share = np.clip(split * 8.0 + 0.5, 0.0, 1.0)[..., None]
    regions = []
    for _ in range(2):
        colour = np.array(random_colour(rng, saturation=(0.0, 0.65), value=(0.2, 0.95)), np.float32)
        other = np.array(random_colour(rng, saturation=(0.0, 0.65), value=(0.2, 0.95)), np.float32)
        ramp = 0.5 + 0.35 * rng.uniform(-1, 1) * y + 0.2 * value_noise(rng, image_size, (2, 5))
        ramp = np.clip(ramp, 0, 1) * rng.uniform(0.2, 0.9)
        relief = rng.uniform(3, 18) * value_noise(rng, image_size, (12, 30, 80))
        if rng.uniform() < 0.4:
            relief = relief + rng.uniform(4, 26) * _pattern(rng, image_size)
        # colour + (other - colour) * ramp + relief, for the three channels in one matrix product.
        basis = np.stack([other - colour, np.ones(3, np.float32)])
        regions.append(np.stack([ramp, relief], axis=-1) @ basis + colour)
    picture: npt.NDArray[np.float32] = regions[0] + (regions[1] - regions[0]) * share
    return picture

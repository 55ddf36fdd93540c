"""Colours, noise and backgrounds of the synthetic scenes."""

from __future__ import annotations

import colorsys
import math

import cv2
import numpy as np
import numpy.typing as npt

from norton_deploy.data.synthetic.canvas import Colour

Field = npt.NDArray[np.float32]


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

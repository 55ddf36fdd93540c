"""A supersampled patch on which one object of a synthetic scene is drawn with OpenCV."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

SUPERSAMPLING = 2
_FRACTION_BITS = 4

Colour = tuple[int, int, int]
Points = npt.NDArray[np.floating]


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

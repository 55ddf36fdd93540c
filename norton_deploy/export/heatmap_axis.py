"""How a RoI's pixels lie on its heatmap along one axis, and the weights that `heatmap_argmax` searches with."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

CUBIC_A = -0.75
"""Coefficient of PyTorch's bicubic kernel."""
BORDER = 2
"""Values by which a map is extended on each side: a resize repeats the edge."""
NOWHERE = -1.0e30
"""Below every heatmap value; finite, since an infinity times a zero weight would be NaN."""
PIECES = 3
"""Polynomial pieces of a block along one axis."""
BLOCK_HULL = ((5, 54, 5, 0), (-4, 54, 14, 0), (0, 14, 54, -4), (0, 5, 54, 5))
"""Control values of a block along one axis, in 64ths of the four map values around it. Those at the ends are the
curve's, the inner two lie on its end tangents, far enough for the curve to stay in the convex hull of the four."""
PIECE_HULL = (
    (5, 54, 5, 0),
    (3, 54, 7, 0),
    (2, 52, 10, 0),
    (0, 48, 16, 0),
    (-4, 40, 28, 0),
    (0, 28, 40, -4),
    (0, 16, 48, 0),
    (0, 10, 52, 2),
    (0, 7, 54, 3),
    (0, 5, 54, 5),
)
"""Bernstein coefficients of a block's three pieces along one axis, in 64ths; neighbours share one."""
PIECE_CELLS = (
    ((3, 1, 0, 0), (1, 3, 0, 0), (0, 3, 1, 0), (0, 1, 3, 0)),
    ((1, 3, 0, 0), (0, 3, 1, 0), (0, 1, 3, 0), (0, 0, 3, 1)),
    ((0, 3, 1, 0), (0, 1, 3, 0), (0, 0, 3, 1), (0, 0, 1, 3)),
)
"""The four cells of the doubled map that each piece depends on, in quarters of the four map values."""


class Axis(NamedTuple):
    """One axis of N RoIs and how their pixels lie on the map of S values; U = S + 1 blocks of 3 pieces.

    Attributes:
        block_tap: int64 [N, U], index in the extended map of the first of each block's four values.
        controls: [N, 3 U + 1, S + 4], weights of the control values; block u has 3 u to 3 u + 3.
        first_pixel: [N, 3 U], each piece's first pixel.
        last_pixel: [N, 3 U], its last, smaller than the first where it has none.
        weights: [N, 3 U, W, 4], how each of a piece's pixels reads the four values. Where there are fewer than W
            pixels the last one is repeated.
    """

    block_tap: Tensor
    controls: Tensor
    first_pixel: Tensor
    last_pixel: Tensor
    weights: Tensor

    def emptiness(self) -> Tensor:
        """[N, U, 3]: 0 where a piece has pixels, NOWHERE where it has none."""
        nothing = torch.where(self.last_pixel < self.first_pixel, NOWHERE, 0.0)
        return nothing.reshape(nothing.shape[0], -1, PIECES)


class Tables(NamedTuple):
    """The search's constants for maps of S values, float32.

    Attributes:
        cuts: [3], where a block's pieces begin in it.
        left_cells: [3], the cell of the doubled map left of each piece, in its block.
        piece_cells: [3, 4, 4], `PIECE_CELLS` as weights.
        controls: [3 U + 1, S + 4], `BLOCK_HULL` for each block of the extended map.
        piece_hull: [16, 100], `PIECE_HULL` along both axes.
    """

    cuts: Tensor
    left_cells: Tensor
    piece_cells: Tensor
    controls: Tensor
    piece_hull: Tensor


def search_tables(size: int) -> Tables:
    """The constants for maps of `size` values. A module keeps them as buffers: a CUDA graph cannot make them."""
    hull = [
        [y * x / 64**2 for y in y_weights for x in x_weights] for y_weights in PIECE_HULL for x_weights in PIECE_HULL
    ]
    return Tables(
        torch.tensor([0.0, 0.25, 0.75]),
        torch.tensor([-0.25, 0.25, 0.75]),
        torch.tensor(PIECE_CELLS) / 4,
        block_controls(size),
        torch.tensor(hull).T.contiguous(),
    )


def lay_out(pixels: Tensor, size: int, largest: int, tables: Tables) -> Axis:
    """Lay the pixels of one axis out on the map.

    On an axis of more than S pixels blocks are `interval_blocks`, on a shorter one `pixel_blocks`.

    Args:
        pixels: [N], whole numbers.
        size: S, values of the map.
        largest: no entry of `pixels` is larger.
        tables: `search_tables(size)`.
    """
    device, dtype = pixels.device, pixels.dtype
    target = pixels[:, None]
    block = torch.arange(size + 1, device=device, dtype=dtype)[None]
    left_of_pixels, cuts_of_pixels = pixel_blocks(block, target, size)
    left_of_intervals, cuts_of_intervals = interval_blocks(block, target, size, tables.cuts)
    few = target <= size
    left = torch.where(few, left_of_pixels, left_of_intervals)
    first = torch.where(few[..., None], cuts_of_pixels, cuts_of_intervals).flatten(1).clamp(min=0)
    first = first.minimum(target)
    last = torch.cat([first[:, 1:], target], dim=1) - 1

    piece_side = max(1, math.ceil(largest / (2 * size)) + 1)
    within = torch.minimum(first[..., None] + torch.arange(piece_side, device=device, dtype=dtype), last[..., None])
    left_of_piece = left.repeat_interleave(PIECES, dim=1)
    # Cells of the doubled map lie at 1/4 and 3/4; the one left of a piece is at -1/4, 1/4 or 3/4 of its block.
    left_cell = tables.left_cells.repeat(size + 1)
    offset = 2 * (map_position(within, target[..., None], size) - (left_of_piece + left_cell)[..., None])
    taps = torch.arange(-1, 3, device=device, dtype=dtype)
    # Within 0..1 but for rounding, and for what stands in pieces without pixels, whose weights must sum to 1 too.
    offset = offset.clamp(min=0, max=1)
    cells = cubic(offset[..., None] - taps).reshape(-1, size + 1, PIECES, piece_side, 4)
    weights = cells @ tables.piece_cells

    first_of_block, last_of_block = first[:, ::PIECES], last[:, PIECES - 1 :: PIECES]
    sample = torch.arange(PIECES, device=device, dtype=dtype)
    samples = torch.minimum(first_of_block[..., None] + sample, last_of_block[..., None]).flatten(1).clamp(min=0)
    samples = torch.cat([samples, target - 1], dim=1)
    exact = map_weights(samples, target, size)
    controls = torch.where(target[..., None] <= PIECES * size, exact, tables.controls)
    tap = (left + (BORDER - 1)).clamp(min=0, max=size + 2 * BORDER - 4).to(torch.int64)
    return Axis(tap, controls, first, last, weights.reshape(-1, (size + 1) * PIECES, piece_side, 4))


def pixel_blocks(block: Tensor, target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of a short axis, where an interval may have several pixels or none: block u is pixel u.

    Args:
        block: [1, U], their numbers.
        target: [N, 1], pixels of the axis.
        size: S, values of the map.

    Returns:
        The map's value left of each block, [N, U], and the first pixel of its three pieces, [N, U, 3].
    """
    at = map_position(block, target, size)
    left = torch.floor(at)
    share = at - left
    return left, torch.stack([block + 0 * target, block + (share < 0.25), block + (share < 0.75)], dim=-1)


def interval_blocks(block: Tensor, target: Tensor, size: int, piece_cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of a long axis: block u is the map's interval from u - 1 to u; as `pixel_blocks`, with `Tables.cuts`."""
    left = block - 1
    # Pixels lie at multiples of 1 / (8 S) from the cuts: a little less than that decides the ties.
    cuts = left[..., None] + piece_cuts
    return left, torch.ceil((cuts + 0.5) * target[..., None] / size - 0.5 - 1 / (16 * size))


def block_controls(size: int) -> Tensor:
    """[3 U + 1, S + 4]: `BLOCK_HULL` for each block of the extended map; one constant, not traced step by step."""
    controls = [[0.0] * (size + 2 * BORDER) for _ in range(PIECES * (size + 1) + 1)]
    for block in range(size + 1):
        for index, weights in enumerate(BLOCK_HULL):
            controls[PIECES * block + index][block : block + 4] = [weight / 64 for weight in weights]
    return torch.tensor(controls)


def map_position(pixels: Tensor, target: Tensor, size: int) -> Tensor:
    """Where pixels of a map of `size` values lie on it once it is resized to `target` pixels."""
    return (pixels + 0.5) * (size / target) - 0.5


def map_weights(pixels: Tensor, target: Tensor, size: int) -> Tensor:
    """Weights of the bicubic resize of the doubled map along one axis, in the map's values.

    Args:
        pixels: [N, Q], output pixels to evaluate.
        target: [N, 1], output size in pixels.
        size: S, values of the map.

    Returns:
        [N, Q, S + 4], weights of the map extended by `BORDER` repeated values on both sides.
    """
    cells = torch.arange(-BORDER, 2 * size + BORDER, device=pixels.device, dtype=pixels.dtype)
    of_cells = cubic(map_position(pixels, target, 2 * size)[..., None] - cells)
    values = torch.arange(-BORDER, size + BORDER, device=pixels.device, dtype=pixels.dtype)
    doubling = (1 - ((cells[:, None] - 0.5) / 2 - values).abs()).clamp(min=0)
    return of_cells @ doubling


def cubic(distance: Tensor) -> Tensor:
    """PyTorch's bicubic kernel (Keys, a = -0.75), elementwise; 0 from a distance of 2 on.

    Each of its two pieces vanishes with its own clamped argument, so their sum needs no case distinction.
    """
    near = distance.abs()
    far = (near - 1).clamp(min=0, max=1)
    near = near.clamp(max=1)
    rest = 1 - far
    return 1 - near * near * ((CUBIC_A + 3) - (CUBIC_A + 2) * near) + CUBIC_A * far * (rest * rest)

"""The best pixel of a resized heatmap with fixed shapes: a search with bounds instead of torchvision's resize.

torchvision doubles a low-resolution map of S x S values bilinearly, resizes the result to the RoI's size in whole
pixels (bicubic, a = -0.75), a different shape for every RoI, and takes the argmax. Both steps are linear and
separable, and together they are a cubic polynomial between any two of the points 1/4, 3/4, 5/4 ... of the map's
grid, with four of the map's values as coefficients. So the largest pixel can be found from bounds:

1. A block is one square of the map's grid, with the RoI's pixels that lie in it. What it can reach is bounded by
   the largest of 4 x 4 control values (`BLOCK_HULL`; of its pixels' own values on an axis of at most 3 S pixels,
   where a block has at most three). The `blocks` with the highest bounds are kept.
2. Each of these is cut at 1/4 and 3/4 into 3 x 3 pieces, each one polynomial, and bounded by its Bernstein
   coefficients (`PIECE_HULL`). The `pieces` with the highest bounds are kept.
3. All pixels of these pieces are evaluated.

Guaranteed: the values found are those of torchvision's resized heatmap, and the best of them is its maximum, both to
rounding, wherever no more than `blocks` blocks and `pieces` pieces have a bound as high as that maximum. Not
guaranteed: which of two pixels is returned that tie to within rounding, and maps with more competing peaks than
that.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


def best_pixel(
    maps: Tensor,
    columns: Tensor,
    rows: Tensor,
    largest_side: int,
    *,
    blocks: int = 32,
    pieces: int = 16,
    tables: Tables | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Argmax of each map, doubled bilinearly and then resized to [rows, columns] as torchvision does.

    Args:
        maps: float32 [N, K, S, S].
        columns, rows: [N], whole numbers of pixels, at least 1.
        largest_side: no RoI has more columns or rows.
        blocks, pieces: how many survive each step of the search (see the module).
        tables: `search_tables(S)` on the maps' device; None makes them.

    Returns:
        x, y (whole pixels as floats) and the value there, each [N, K].
    """
    count, keypoints, size = maps.shape[:3]
    extended = F.pad(maps, (BORDER, BORDER, BORDER, BORDER), mode="replicate")
    if tables is None:
        tables = Tables(*(table.to(maps.device) for table in search_tables(size)))
    x_axis, y_axis = (lay_out(pixels, size, largest_side, tables) for pixels in (columns, rows))
    bound, y_block, x_block = best_blocks(extended, x_axis, y_axis, blocks)
    values = block_values(extended, x_axis, y_axis, y_block, x_block)
    bound, slot, y_piece, x_piece = best_pieces(
        values, bound, x_axis, y_axis, y_block, x_block, pieces, tables.piece_hull
    )

    # A piece without pixels has weights that sum to 1 as well: values far below all others keep it out.
    values = take_rows(values, slot) + torch.where(bound < NOWHERE / 2, NOWHERE, 0.0).reshape(-1, 1)
    side = x_axis.weights.shape[2]
    x_weights = take_rows(x_axis.weights.flatten(2), x_piece).reshape(-1, side, 4)
    y_weights = take_rows(y_axis.weights.flatten(2), y_piece).reshape(-1, side, 4)
    pixels = torch.bmm(torch.bmm(y_weights, values.reshape(-1, 4, 4)), x_weights.transpose(1, 2))

    score, best = pixels.reshape(count, keypoints, -1).topk(1, dim=-1)
    piece, within = divide(best, side * side)
    row, column = divide(within, side)
    x = pixel_of(x_axis, x_piece.gather(2, piece), column)
    y = pixel_of(y_axis, y_piece.gather(2, piece), row)
    return x[..., 0], y[..., 0], score[..., 0]


def best_blocks(extended: Tensor, x_axis: Axis, y_axis: Axis, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bound, row and column of the blocks with the highest bounds, each [N, K, Q], falling.

    Args:
        extended: float32 [N, K, S + 4, S + 4].
        blocks: Q, at most.
    """
    count, keypoints, width = extended.shape[:3]
    by_column = torch.bmm(extended.reshape(count, keypoints * width, width), x_axis.controls.transpose(1, 2))
    controls = y_axis.controls[:, None] @ by_column.reshape(count, keypoints, width, -1)
    bound = F.max_pool2d(controls, kernel_size=PIECES + 1, stride=PIECES)
    # Sums with 0 or NOWHERE instead of selections: engines run them several times faster.
    outside = y_axis.emptiness().amax(2)[:, :, None] + x_axis.emptiness().amax(2)[:, None, :]
    bound = (bound + outside[:, None]).flatten(2)
    block_bound, block = bound.topk(min(blocks, bound.shape[2]), dim=-1)
    return block_bound, *divide(block, outside.shape[2])


def block_values(extended: Tensor, x_axis: Axis, y_axis: Axis, y_block: Tensor, x_block: Tensor) -> Tensor:
    """The 4 x 4 map values of each block [N, K, Q] -> [N, K * Q, 16]."""
    count, keypoints, found = y_block.shape
    width = extended.shape[2]
    owner = torch.arange(count * keypoints, device=extended.device).repeat_interleave(found) * width
    y_tap = y_axis.block_tap.gather(1, y_block.flatten(1)).reshape(-1)
    x_tap = x_axis.block_tap.gather(1, x_block.flatten(1)).reshape(-1)
    tap = torch.arange(4, device=extended.device)
    index = ((owner + y_tap) * width + x_tap)[:, None] + (tap[:, None] * width + tap).reshape(1, -1)
    return extended.reshape(-1).index_select(0, index.reshape(-1)).reshape(count, keypoints * found, 16)


def best_pieces(
    values: Tensor,
    block_bound: Tensor,
    x_axis: Axis,
    y_axis: Axis,
    y_block: Tensor,
    x_block: Tensor,
    pieces: int,
    hull: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pieces of the kept blocks that have the highest bounds.

    Args:
        values: [N, K * Q, 16] of `block_values`.
        block_bound, y_block, x_block: [N, K, Q] of `best_blocks`.
        pieces: P, at most.
        hull: `Tables.piece_hull`.

    Returns:
        bound; row of `values`; row and column of the piece among all 3 U of an axis: each [N, K, P].
    """
    count, keypoints, found = block_bound.shape
    side = len(PIECE_HULL)
    controls = (values.reshape(-1, 16) @ hull).reshape(-1, 1, side, side)
    bound = F.max_pool2d(controls, kernel_size=PIECES + 1, stride=PIECES).reshape(-1, PIECES, PIECES)
    bound = bound.minimum(block_bound.reshape(-1, 1, 1))
    y_outside, x_outside = take_rows(y_axis.emptiness(), y_block), take_rows(x_axis.emptiness(), x_block)
    bound = bound + (y_outside[:, :, None] + x_outside[:, None, :])
    bound = bound.reshape(count, keypoints, found * PIECES * PIECES)
    piece_bound, index = bound.topk(min(pieces, bound.shape[2]), dim=-1)
    slot, piece = divide(index, PIECES * PIECES)
    y_piece, x_piece = divide(piece, PIECES)
    y_piece = y_piece + y_block.gather(2, slot) * PIECES
    x_piece = x_piece + x_block.gather(2, slot) * PIECES
    first = torch.arange(keypoints, device=values.device).reshape(1, keypoints, 1) * found
    return piece_bound, slot + first, y_piece, x_piece


def pixel_of(axis: Axis, piece: Tensor, offset: Tensor) -> Tensor:
    """Pixel number `offset` [N, K, 1] of a piece [N, K, 1], or its last one, as a float."""
    first = axis.first_pixel.gather(1, piece[..., 0])
    last = axis.last_pixel.gather(1, piece[..., 0])
    return torch.minimum(first + offset[..., 0].to(first.dtype), last)[..., None]


def take_rows(table: Tensor, row: Tensor) -> Tensor:
    """Rows [N, ...] of each image's table [N, R, C] -> [rows in all, C]; one flat gather of whole rows."""
    count, rows, _ = table.shape
    image = torch.arange(count, device=table.device)[:, None] * rows
    return table.flatten(0, 1).index_select(0, (row.flatten(1) + image).reshape(-1))


def divide(index: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of indices."""
    quotient = torch.div(index, by, rounding_mode="floor")
    return quotient, index - quotient * by


def lay_out(pixels: Tensor, size: int, largest: int, tables: Tables) -> Axis:
    """Lay the pixels of one axis out on the map.

    On an axis of more than S pixels block u is the map's interval from u - 1 to u. On a shorter one, where an
    interval may have several blocks' or no pixels, block u is pixel u.

    Args:
        pixels: [N], whole numbers.
        size: S, values of the map.
        largest: no entry of `pixels` is larger.
        tables: `search_tables(size)`.
    """
    device, dtype = pixels.device, pixels.dtype
    target = pixels[:, None]
    block_count = size + 1
    block = torch.arange(block_count, device=device, dtype=dtype)[None]
    few = target <= size

    at = map_position(block, target, size)
    left = torch.where(few, torch.floor(at), block - 1)
    share = at - torch.floor(at)
    cut_few = torch.stack([block + 0 * target, block + (share < 0.25), block + (share < 0.75)], dim=-1)
    # Pixels lie at multiples of 1 / (8 S) from the cuts: a little less than that decides the ties.
    cuts = block[..., None] - 1 + tables.cuts
    cut_many = torch.ceil((cuts + 0.5) * target[..., None] / size - 0.5 - 1 / (16 * size))
    first = torch.where(few[..., None], cut_few, cut_many).flatten(1).clamp(min=0)
    first = first.minimum(target)
    last = torch.cat([first[:, 1:], target], dim=1) - 1

    piece_side = max(1, math.ceil(largest / (2 * size)) + 1)
    within = torch.minimum(first[..., None] + torch.arange(piece_side, device=device, dtype=dtype), last[..., None])
    left_of_piece = left.repeat_interleave(PIECES, dim=1)
    # Cells of the doubled map lie at 1/4 and 3/4; the one left of a piece is at -1/4, 1/4 or 3/4 of its block.
    left_cell = tables.left_cells.repeat(block_count)
    offset = 2 * (map_position(within, target[..., None], size) - (left_of_piece + left_cell)[..., None])
    taps = torch.arange(-1, 3, device=device, dtype=dtype)
    # Within 0..1 but for rounding, and for what stands in pieces without pixels, whose weights must sum to 1 too.
    offset = offset.clamp(min=0, max=1)
    cells = cubic(offset[..., None] - taps).reshape(-1, block_count, PIECES, piece_side, 4)
    weights = cells @ tables.piece_cells

    first_of_block, last_of_block = first[:, ::PIECES], last[:, PIECES - 1 :: PIECES]
    sample = torch.arange(PIECES, device=device, dtype=dtype)
    samples = torch.minimum(first_of_block[..., None] + sample, last_of_block[..., None]).flatten(1).clamp(min=0)
    samples = torch.cat([samples, target - 1], dim=1)
    exact = map_weights(samples, target, size)
    controls = torch.where(target[..., None] <= PIECES * size, exact, tables.controls)
    tap = (left + (BORDER - 1)).clamp(min=0, max=size + 2 * BORDER - 4).to(torch.int64)
    return Axis(tap, controls, first, last, weights.reshape(-1, block_count * PIECES, piece_side, 4))


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

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
that. Where products are rounded to TF32 the pixel's value is within a thousandth of the map's range of the maximum
(held by a test that rounds them).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from norton_deploy.export.heatmap_axis import BORDER, NOWHERE, PIECE_HULL, PIECES, Axis, Tables, lay_out, search_tables
from norton_deploy.export.static_boxes import gather_rows


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
    # Weights sum to 1, so the level of a map changes nothing; without it, products in TF32 lose a share of its range.
    level = maps.mean(dim=(2, 3), keepdim=True)
    extended = F.pad(maps - level, (BORDER, BORDER, BORDER, BORDER), mode="replicate")
    if tables is None:
        tables = Tables(*(table.to(maps.device) for table in search_tables(size)))
    x_axis, y_axis = (lay_out(pixels, size, largest_side, tables) for pixels in (columns, rows))
    bound, y_block, x_block = best_blocks(extended, x_axis, y_axis, blocks)
    values = block_values(extended, x_axis, y_axis, y_block, x_block)
    bound, slot, y_piece, x_piece = best_pieces(
        values, bound, x_axis, y_axis, y_block, x_block, pieces, tables.piece_hull
    )

    # A piece without pixels has weights that sum to 1 as well: values far below all others keep it out.
    values = gather_rows(values, slot.flatten(1)).flatten(0, 1) + torch.where(
        bound < NOWHERE / 2, NOWHERE, 0.0
    ).reshape(-1, 1)
    side = x_axis.weights.shape[2]
    x_weights = gather_rows(x_axis.weights.flatten(2), x_piece.flatten(1)).reshape(-1, side, 4)
    y_weights = gather_rows(y_axis.weights.flatten(2), y_piece.flatten(1)).reshape(-1, side, 4)
    pixels = torch.bmm(torch.bmm(y_weights, values.reshape(-1, 4, 4)), x_weights.transpose(1, 2))

    score, best = pixels.reshape(count, keypoints, -1).topk(1, dim=-1)
    piece, within = divide(best, side * side)
    row, column = divide(within, side)
    x = pixel_of(x_axis, x_piece.gather(2, piece), column)
    y = pixel_of(y_axis, y_piece.gather(2, piece), row)
    return x[..., 0], y[..., 0], score[..., 0] + level[..., 0, 0]


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
    y_outside = gather_rows(y_axis.emptiness(), y_block.flatten(1)).flatten(0, 1)
    x_outside = gather_rows(x_axis.emptiness(), x_block.flatten(1)).flatten(0, 1)
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

"""COCO's masks: run-length encodings and polygons, checked before anything trusts their numbers.

pycocotools takes counts and coordinates as they are: what does not add up ends in its C code as uninitialised memory
or a crash. A run-length encoding is therefore decoded here, and a polygon reaches pycocotools only when it is finite,
near its image and short enough to rasterise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from norton_deploy.errors import UserError, shown

MARGIN = 1.0
"""How far outside the image a coordinate may lie, in units of the image's width (x) or height (y)."""
LONGEST_OUTLINE = 2**20
"""Pixels along all polygons of one object; pycocotools' memory grows with it."""
_BITS = 5  # of a run's length in each character
_MOST_CHARACTERS = 7  # that a length needs which fits into the largest image


def decode_segmentation(segmentation: Any, image_size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """COCO polygons or RLE (compressed or not) -> mask uint8 [H, W] of 0 and 1.

    Raises:
        UserError: see `check_segmentation`.
    """
    height, width = image_size
    if isinstance(segmentation, dict):
        runs = run_lengths(segmentation, image_size)
        mask = np.repeat(np.arange(len(runs), dtype=np.int64) & 1, runs).astype(np.uint8)
        return mask.reshape(width, height).T
    check_polygons(segmentation, image_size)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


def check_segmentation(segmentation: object, image_size: tuple[int, int]) -> None:
    """Refuse a segmentation that pycocotools cannot be trusted with.

    Args:
        image_size: (height, width) of its image.

    Raises:
        UserError: see `run_lengths` and `check_polygons`.
    """
    if isinstance(segmentation, dict):
        run_lengths(segmentation, image_size)
    else:
        check_polygons(segmentation, image_size)


def run_lengths(segmentation: dict[str, Any], image_size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The lengths of an RLE's runs, down the columns, of zeros and ones in turn.

    Raises:
        UserError: `size` is not the image's, a count is no whole number of 0 or more, a compressed string is damaged,
            or the counts do not sum to height x width.
    """
    size, counts = list(image_size), segmentation.get("counts")
    if segmentation.get("size") != size or counts is None:
        raise UserError(f"its RLE needs 'counts' and 'size' {size}, got size {shown(segmentation.get('size'))}")
    pixels = size[0] * size[1]
    if isinstance(counts, str | bytes):
        runs = _uncompressed(counts)
    elif isinstance(counts, list) and set(map(type, counts)) <= {int} and all(0 <= run <= pixels for run in counts):
        runs = np.array(counts, np.int64)
    else:
        raise UserError("its RLE's 'counts' must be a string or a list of whole numbers from 0 to the image's pixels")
    total = int(runs.sum())
    if (runs.size and runs.min() < 0) or total != pixels:
        raise UserError(f"its RLE covers {total} of the image's {pixels} pixels")
    return runs


def _uncompressed(counts: str | bytes) -> npt.NDArray[np.int64]:
    """The runs in pycocotools' string: little-endian groups of 5 bits, the differences to the run before last."""
    try:
        raw = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise UserError("its RLE's 'counts' is no string of pycocotools") from error
    groups = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(groups & 0x20 == 0)
    first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    damaged = not len(last) or last[-1] != len(groups) - 1 or groups.min() < 0 or groups.max() > 63
    if damaged or (last - first).max() >= _MOST_CHARACTERS:
        raise UserError("its RLE's 'counts' is damaged or cut off")
    place = np.arange(len(groups)) - np.repeat(first, last - first + 1)
    runs = np.add.reduceat((groups & 0x1F) << (_BITS * place), first)
    negative = groups[last] & 0x10 != 0
    runs -= negative.astype(np.int64) << (_BITS * (last - first + 1))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def check_polygons(polygons: Any, image_size: tuple[int, int]) -> None:
    """Refuse polygons that are not lists of three or more finite x, y pairs near the image.

    Raises:
        UserError: they are not; or they lie further outside than `MARGIN`, or are longer than `LONGEST_OUTLINE`.
    """
    sound = isinstance(polygons, list) and len(polygons) > 0
    sound = sound and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons)
    if not sound or not all(set(map(type, polygon)) <= {int, float} for polygon in polygons):
        raise UserError("'segmentation' must be an RLE or polygons of three or more x, y pairs")
    height, width = image_size
    outline = 0.0
    for polygon in polygons:
        check_near(polygon[0::2], width, "'segmentation': x")
        check_near(polygon[1::2], height, "'segmentation': y")
        outline += len(polygon) / 2 * (width + height)
    if outline * (1 + 2 * MARGIN) <= LONGEST_OUTLINE:  # however its corners lie
        return
    corners = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    outline = sum(float(np.abs(points - np.roll(points, 1, axis=0)).sum()) for points in corners)
    if outline > LONGEST_OUTLINE:
        raise UserError(f"'segmentation': its outline is {outline:.0f} pixels long, more than {LONGEST_OUTLINE}")


def check_near(values: list[Any], side: int, name: str) -> None:
    """Refuse coordinates that are not finite or lie further outside the image than `MARGIN`.

    Args:
        values: of one axis, integers and floats.
        side: the image's extent along it in pixels.
        name: of the field, for the message.

    Raises:
        UserError: one of them is such.
    """
    try:
        finite = math.isfinite(math.fsum(values))
    except (OverflowError, ValueError):  # integers beyond floats; infinities of both signs
        finite = False
    low, high = min(values), max(values)
    if not finite or low < -MARGIN * side or high > (1 + MARGIN) * side:
        found = f"{name} from {shown(low)} to {shown(high)}"
        raise UserError(f"{found}: expected finite numbers, at most {MARGIN:g} image sides outside 0..{side}")

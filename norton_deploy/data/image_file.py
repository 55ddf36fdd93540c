"""The one way in for picture files: of a known kind, of a bounded size, upright, RGB.

Policy on EXIF orientation: every picture is turned upright as its orientation tag says, in training, evaluation and
inference alike, and annotations belong to the upright picture. A tag that cannot be read means upright.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from norton_deploy.errors import UserError
from norton_deploy.files import require_regular

MAX_PIXELS = 2**26
"""Largest picture, height x width (8192 x 8192); a larger one is refused before its pixels are decoded."""
_LATE_FORMATS = (TiffImagePlugin, WebPImagePlugin)  # that Pillow knows only once they are imported
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
"""Pillow's names of the formats that are read, whatever a file's name ends in."""
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def read_image(path: str | Path) -> npt.NDArray[np.uint8]:
    """Decode a picture: uint8 RGB [H, W, 3], upright; grey, palette, CMYK and 16-bit grey are converted, alpha dropped.

    Raises:
        UserError: the file is missing, no regular file, no picture of `FORMATS`, truncated, or larger than
            `MAX_PIXELS`.
    """
    return np.array(read_picture(path))


def read_picture(path: str | Path) -> Image.Image:
    """As `read_image`, as Pillow's picture of mode RGB."""
    with _opened(path) as picture:
        turn = _TURNS.get(_orientation(picture))
        rgb = _to_rgb(picture)
        return rgb if turn is None else rgb.transpose(turn)


def check_decodes(path: str | Path) -> None:
    """Decode a picture only to see whether it can be, JPEGs at an eighth of the size (the whole file is read).

    Raises:
        UserError: see `read_image`.
    """
    with _opened(path) as picture:
        picture.draft("L", (picture.width // 8, picture.height // 8))
        picture.load()


def sizes_of(path: str | Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of a picture upright, and as it is stored; nothing is decoded.

    Raises:
        UserError: see `read_image`.
    """
    with _opened(path) as picture:
        stored = picture.height, picture.width
        return (stored[::-1] if _orientation(picture) in _SIDEWAYS else stored), stored


def is_turned(path: str | Path) -> bool:
    """Whether a picture is stored otherwise than upright.

    Raises:
        UserError: see `read_image`.
    """
    with _opened(path) as picture:
        return _orientation(picture) in _TURNS


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    require_regular(path, "a picture")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise UserError(f"{path}: has {size} pixels, more than {MAX_PIXELS} in all; make it smaller")
            yield picture
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not a picture; expected {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders meet broken files with whatever their code runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot decode this picture ({reason}); repair or remove it") from error


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a damaged tag does not make the picture unreadable
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # Pillow's own conversion cuts off at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode}; expected 8 or 16 bits a channel")
    return picture.convert("RGB")

"""Plain images from a folder, for everything that needs pictures but no labels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from norton_deploy.data.image_file import read_image
from norton_deploy.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def find_images(folder: str | Path) -> list[Path]:
    """All image files below `folder`, sorted by path; a single file is a list of itself.

    Raises:
        UserError: nothing is there.
    """
    root = Path(folder)
    paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: no images here; expected files ending in {', '.join(SUFFIXES)}")
    return paths


def read_images(folder: str | Path, limit: int) -> Iterator[Tensor]:
    """The images below `folder`, at most `limit` of them, evenly spaced over the sorted list, in a mixed order.

    Mixed, always alike: in a folder of classes neighbours in the list look alike, and whoever takes the images in
    batches (BatchNorm's statistics) would see one class at a time.

    Yields:
        float32 [3, H, W], 0..1 RGB, upright.

    Raises:
        UserError: there are none, one cannot be decoded, or the limit is below 1.
    """
    # here, because who only looks for files on a machine that runs graphs has no torch
    import torch

    if limit < 1:
        raise UserError(f"{folder}: expected to read at least 1 image, got {limit}")
    paths = find_images(folder)
    step = max(1, len(paths) // limit)
    chosen = paths[::step][:limit]
    random.Random(0).shuffle(chosen)
    for path in chosen:
        yield torch.from_numpy(read_image(path)).permute(2, 0, 1).contiguous().to(torch.float32) / 255

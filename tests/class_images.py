"""Small folders of images by class, for tests of classifiers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

BLUE_AND_RED = {"blue": (40, 60, 210), "red": (220, 50, 40)}
"""Noisy images of these colours are told apart after a few steps."""


def write_class_images(
    root: Path,
    counts: Mapping[str, int],
    classes: Mapping[str, tuple[int, int, int] | None],
    *,
    shape: tuple[int, int] = (32, 32),
    suffix: str = ".png",
) -> Path:
    """SPLIT/CLASS/INDEX.png, so many of each class as `counts` says; around the class's colour, or of any; `root`."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name, colour in classes.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                if colour is None:
                    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
                else:
                    pixels = rng.normal(colour, 30, (*shape, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}{suffix}")
    return root

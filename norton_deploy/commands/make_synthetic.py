"""norton make-synthetic: write the embedded dataset in COCO's layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.config import parse_settings
from norton_deploy.data.synthetic import CATEGORIES, write_dataset


@dataclass
class Settings:
    """Settings of make_synthetic."""

    out: Path
    """Folder to make: train2017/, val2017/ and annotations/ go into it."""
    train: int = 1000
    """Number of training images."""
    val: int = 200
    """Number of validation images."""
    seed: int = 0
    """Seed of every picture; another seed makes other pictures."""
    min_size: int = 160
    """Shortest side of an image in pixels; height and width are drawn between this and the longest."""
    max_size: int = 256
    """Longest side of an image in pixels."""
    workers: int | None = None
    """Processes; by default one per core, at most 16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    settings = parse_settings(
        Settings,
        argv,
        prog="make_synthetic",
        description="Write a synthetic dataset in COCO-2017's layout: boxes, masks, crowds and keypoints.",
    )
    write_dataset(
        settings.out,
        settings.train,
        settings.val,
        seed=settings.seed,
        image_sizes=(settings.min_size, settings.max_size),
        workers=settings.workers,
        progress=True,
    )
    names = ", ".join(category["name"] for category in CATEGORIES)
    print(f"{settings.out}: {settings.train} training and {settings.val} validation images of {names}")
    return 0

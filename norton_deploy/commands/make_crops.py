"""norton make-crops: cut a COCO dataset's objects out into one folder per class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.config import parse_settings
from norton_deploy.data.classification import write_crops


@dataclass
class Settings:
    """Settings of make_crops."""

    data: Path
    """Dataset in COCO's layout."""
    out: Path
    """Folder to make: train/CLASS/*.jpg and val/CLASS/*.jpg go into it."""
    size: int = 48
    """Side of a crop in pixels."""
    smallest_side: float = 10.0
    """Objects whose longer side is shorter than this are left out, in pixels."""
    skip_bad: bool = False
    """Skip bad images and annotations with a counted warning instead of stopping."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    settings = parse_settings(
        Settings,
        argv,
        prog="make_crops",
        description="Cut the objects of a COCO dataset out as a classification dataset for pretraining.",
    )
    counts = write_crops(
        settings.data,
        settings.out,
        settings.size,
        smallest_side=settings.smallest_side,
        skip_bad=settings.skip_bad,
        progress=True,
    )
    print(f"{settings.out}: {counts['train']} training and {counts['val']} validation crops")
    return 0

"""Convert a dataset in YOLO's or Pascal VOC's layout into COCO's, which everything here reads."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.config import parse_settings
from norton_deploy.data.import_layout import Layout, import_dataset
from norton_deploy.files import check_output_folder


@dataclass(frozen=True)
class Settings:
    """Settings of tools/import_data.py."""

    layout: Layout
    """yolo (images/, labels/ and data.yaml) or voc (JPEGImages/ and Annotations/ of .xml files)."""
    train: Path
    """Folder of the training images; labels lie in labels/ (voc: Annotations/) in place of images/, or beside them. For
    voc also a list of names, ImageSets/Main/train.txt."""
    val: Path
    """The same of the held-out images."""
    out: Path
    """Folder to make: train2017/, val2017/ and annotations/ go into it."""
    names: Path | None = None
    """YOLO's data.yaml, which names the classes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="import_data", description=__doc__ or "")
    check_output_folder(settings.out)
    counts = import_dataset(settings.layout, settings.train, settings.val, settings.out, names=settings.names)
    for split, (images, objects) in counts.items():
        print(f"{settings.out}: {split}, {images} images, {objects} objects", file=sys.stderr)
    return 0

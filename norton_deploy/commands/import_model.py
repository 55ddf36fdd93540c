"""Take a trained torchvision detector (.pth) in: one checkpoint that knows its categories and image size."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.checkpoints.checkpoint import save_checkpoint
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.commands import command_line
from norton_deploy.config import parse_settings
from norton_deploy.files import check_output_file, refuse_same_file


@dataclass(frozen=True)
class Settings:
    """Settings of tools/import_model.py."""

    model: Path
    """torchvision's .pth, or a checkpoint (.safetensors) that is to be for another image size."""
    out: Path
    """Checkpoint to write (.safetensors)."""
    categories: Path | None = None
    """Categories of a .pth file: a COCO annotation file or a list of names, one a line."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the images that it is for; by default its own (of a .pth 800, 1333)."""
    overwrite: bool = False
    """Replace --out if it is there already."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="import_model", description=__doc__ or "")
    refuse_same_file(settings.out, settings.model)
    check_output_file(settings.out, "--out", ".safetensors", overwrite=settings.overwrite)
    opened = open_model(str(settings.model), categories=settings.categories, image_size=settings.image_size)
    save_checkpoint(
        settings.out, opened.model, opened.header.made_by(command_line("import_model", argv), settings.model)
    )
    names = ", ".join(opened.header.categories.names[:8])
    print(f"{settings.out}: task {opened.header.task}, categories {names}", file=sys.stderr)
    return 0

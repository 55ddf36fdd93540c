"""Import a Faster, Mask or Keypoint R-CNN R50-FPN that was trained in Detectron2."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from norton_deploy.checkpoints.checkpoint import save_checkpoint
from norton_deploy.checkpoints.open_model import with_image_size
from norton_deploy.commands import command_line
from norton_deploy.detectron2.checkpoint import import_detectron2
from norton_deploy.files import check_output_file


@dataclass(frozen=True)
class Settings:
    """Settings of tools/import_detectron2.py."""

    config: Path
    """Detectron2's YAML file of the model; files named by _BASE_ are read too."""
    weights: Path
    """Its weights: model_final.pkl (model zoo) or model_final.pth."""
    out: Path
    """Checkpoint to write (.safetensors)."""
    annotations: Path | None = None
    """COCO annotation file of the training data, for the names and ids of its categories; COCO's own need none."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the images that it is for; by default the configuration's."""
    overwrite: bool = False
    """Replace --out if it is there already."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    # Not parse_settings: --config is Detectron2's file here.
    settings = tyro.cli(Settings, args=argv, prog="import_detectron2", description=__doc__)
    check_output_file(settings.out, "--out", ".safetensors", overwrite=settings.overwrite)
    imported = import_detectron2(settings.config, settings.weights, settings.annotations)
    if settings.image_size is not None:
        imported = with_image_size(imported, settings.image_size)
    header = imported.header.made_by(command_line("import_detectron2", argv), settings.weights)
    save_checkpoint(settings.out, imported.model, header)
    count = len(header.categories.labels)
    print(f"{settings.out}: task {header.task}, {count} categories, all keys of {settings.weights}", file=sys.stderr)
    return 0

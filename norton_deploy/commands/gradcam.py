"""Grad-CAM of a dense model and its compressed forms side by side, and how far their maps agree.

Classifiers are asked for the class that the dense model predicts; detectors for the detection that all models share
and are surest of, or for a given box. The picture shows some images; the correlations are means over all.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.commands import Output, write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import find_images, read_images
from norton_deploy.errors import UserError, require_least
from norton_deploy.files import check_output_file
from norton_deploy.reporting.gradcam import Box, compare_gradcam, open_compared
from norton_deploy.reporting.gradcam_picture import draw_gradcam
from norton_deploy.reporting.provenance import provenance


@dataclass(frozen=True)
class Settings(Output):
    """Settings of tools/gradcam.py."""

    model: Path
    """The dense classifier or detector (.safetensors, or torchvision's .pth)."""
    compressed: tuple[Path, ...]
    """Its compressed forms, one or several, in the order of the columns."""
    images: Path
    """Folder of images, or one image."""
    out: Path
    """Picture to write (.png or .jpg)."""
    count: int = 50
    """Images over which the correlations are averaged, at most."""
    rows: int = 5
    """Images in the picture, at most."""
    layers: tuple[str, ...] = ()
    """Layers whose output is mapped; by default three levels, the last stages of the backbone."""
    box: Box | None = None
    """Detectors: the box to explain, xyxy in pixels, of one image; by default the best detection that all share."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="gradcam", description=__doc__ or "")
    if settings.out.suffix not in (".png", ".jpg"):
        raise UserError(f"--out {settings.out}: expected a .png or .jpg file")
    check_output_file(settings.out, "--out", overwrite=settings.overwrite)
    require_least(1, count=settings.count, rows=settings.rows)
    if not settings.compressed:
        raise UserError("--compressed: expected one or several models after it")
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    if settings.box is not None and len(find_images(settings.images)) != 1:
        raise UserError(f"--box: goes with one image, {settings.images} holds more")
    models = open_compared(settings.model, settings.compressed)
    images = read_images(settings.images, settings.count)
    found = compare_gradcam(models, images, layers=settings.layers, box=settings.box, rows=settings.rows)
    draw_gradcam(settings.out, found)
    for name, levels in found.correlation.items():
        means = ", ".join(f"{layer} {level['mean']}" for layer, level in levels.items())
        print(f"{name} against dense, mean correlation of the maps of {found.images} images: {means}", file=sys.stderr)
    figures = {
        "model": str(settings.model),
        "images": found.images,
        "images_without_a_shared_detection": found.skipped,
        "correlation": found.correlation,
        "provenance": provenance(),
    }
    write_json(figures, settings.json)
    return 0

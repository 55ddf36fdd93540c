"""norton predict: detect in images; writes annotated images and one COCO JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.commands import write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import find_images
from norton_deploy.errors import UserError
from norton_deploy.files import check_output_file
from norton_deploy.inference.drawing import annotate_images
from norton_deploy.inference.loading import load_predictor


@dataclass
class Settings:
    """Settings of predict."""

    model: Path
    """Checkpoint, .onnx, .engine or a folder of graphs."""
    images: tuple[Path, ...]
    """Image files and folders of images."""
    out: Path
    """Folder for the annotated images and detections.json."""
    device: str | None = None
    """cpu, cuda or cuda:N; a GPU if there is one."""
    score_threshold: float = 0.05
    """Detections below this score are left out of the JSON."""
    draw_threshold: float = 0.5
    """Detections below this score are not drawn."""
    overwrite: bool = False
    """Replace --out's detections.json and pictures, and --json, if they are there already."""
    json: Path | None = None
    """Also write counts and mean stage times as JSON here ("-": stdout)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Detect in all images; 1 if some of them could not be read (the others' detections are written)."""
    settings = parse_settings(Settings, argv, prog="predict", description=__doc__ or "")
    files = [file for path in settings.images for file in find_images(path)]
    if not files:
        raise UserError("--images: expected image files or folders after it")
    result_file = settings.out / "detections.json"
    check_output_file(result_file, "--out", overwrite=settings.overwrite)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    predictor = load_predictor(settings.model, score_threshold=settings.score_threshold, device=settings.device)
    found = annotate_images(predictor, files, settings.out, draw_threshold=settings.draw_threshold)
    print(f"{settings.out}: {found.images} images, {found.detections} detections", file=sys.stderr)
    summary = {
        "images": found.images,
        "bad_images": len(found.bad),
        "detections": found.detections,
        "model": predictor.name,
        "device": predictor.device,
        "mean_ms": found.mean_ms,
    }
    write_json(summary, settings.json)
    if found.bad:
        raise UserError(f"{len(found.bad)} of {len(files)} images were left out, the first because: {found.bad[0]}")
    return 0

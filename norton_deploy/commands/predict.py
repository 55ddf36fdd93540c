"""norton predict: detect in images; writes annotated images and one COCO JSON.

One process: tools/predict.py ...; several share the images: torchrun --nproc_per_node=8 tools/predict.py ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.commands import Output, write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import find_images
from norton_deploy.errors import UserError
from norton_deploy.files import check_output_file, sha256_of
from norton_deploy.inference.drawing import annotate_images
from norton_deploy.inference.image_journal import SUFFIX, ImageJournal, joined_processes
from norton_deploy.inference.loading import load_predictor, model_files


@dataclass(frozen=True)
class Settings(Output):
    """Settings of predict."""

    model: Path
    """Checkpoint, .onnx, .engine or a folder of graphs."""
    images: tuple[Path, ...]
    """Image files and folders of images."""
    out: Path
    """Folder for the annotated images and detections.json."""
    categories: Path | None = None
    """Categories of a .pth file, which names none: a COCO annotation file or a list of names."""
    device: str | None = None
    """cpu, cuda or cuda:N; a GPU if there is one."""
    score_threshold: float = 0.05
    """Detections below this score are left out of the JSON."""
    draw_threshold: float = 0.5
    """Detections below this score are not drawn."""
    resume: bool = False
    """Go on at the image where this very line was stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Detect in all images; 1 if some of them could not be read (the others' detections are written)."""
    settings = parse_settings(Settings, argv, prog="predict", description=__doc__ or "")
    files = [file for path in settings.images for file in find_images(path)]
    if not files:
        raise UserError("--images: expected image files or folders after it")
    result_file = settings.out / "detections.json"
    parts = result_file.with_suffix(SUFFIX)
    stopped = settings.resume and parts.is_dir()
    check_output_file(result_file, "--out", overwrite=settings.overwrite or stopped)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    processes = joined_processes()
    predictor = load_predictor(
        settings.model,
        score_threshold=settings.score_threshold,
        device=settings.device or processes.device,
        categories=settings.categories,
    )
    identity = {
        "model": [sha256_of(file) for file in model_files(settings.model)],
        "files": [str(file) for file in files],
        "categories": None if settings.categories is None else sha256_of(settings.categories),
        "thresholds": [settings.score_threshold, settings.draw_threshold],
    }
    resume, overwrite = settings.resume, settings.overwrite
    journal = ImageJournal(parts, identity, resume=resume, overwrite=overwrite, processes=processes)
    found = annotate_images(
        predictor, files, settings.out, draw_threshold=settings.draw_threshold, journal=journal, processes=processes
    )
    if processes.rank != 0:
        return 0
    journal.remove()
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

"""norton serve: a page in the browser to try a model on a picture, a clip or the camera, beside a baseline."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.config import parse_settings
from norton_deploy.data.category_list import lists_of_files
from norton_deploy.errors import UserError
from norton_deploy.inference.loading import PackagedTask, load_predictor, packaged_detector
from norton_deploy.video.try_page import Tried, serve, try_page

FIRST = ("model", "baseline")
THIS_MACHINE = "127.0.0.1"


@dataclass
class Settings:
    """Settings of the page."""

    model: Path | None = None
    """Checkpoint, .onnx, .engine or a folder of graphs; the packaged detector of --task unless given."""
    task: PackagedTask = "mask"
    """Which packaged detector runs without --model; it knows drawn scenes only."""
    baseline: Path | None = None
    """Second model, shown on the left for comparison."""
    host: str = THIS_MACHINE
    """Address to listen on. Another than this machine's own lets others use the page, without a password."""
    port: int | None = None
    """Port to listen on; a free one from 7860 on unless given."""
    score_threshold: float = 0.5
    """Score that the slider starts at."""
    categories: Path | None = None
    """Categories of a .pth file, which names none: a COCO annotation file or a list of names."""
    device: str | None = None
    """cpu, cuda or cuda:N; a GPU if there is one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C."""
    settings = parse_settings(Settings, argv, prog="serve", description=__doc__ or "")
    if not 0 <= settings.score_threshold <= 1:
        raise UserError(f"--score-threshold: expected 0..1, got {settings.score_threshold}")
    files = {"Model": settings.model or packaged_detector(settings.task)}
    if settings.baseline is not None:
        files = {"Baseline": settings.baseline, **files}
    categories = lists_of_files(files.values(), settings.categories)
    models = [
        Tried(f"{label}: {file.name}", load_predictor(file, device=settings.device, categories=categories.get(file)))
        for label, file in files.items()
    ]
    if settings.host != THIS_MACHINE:
        print(f"warning: everybody who reaches {settings.host} can use this page", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="norton-serve-") as folder:
        serve(try_page(models, Path(folder), settings.score_threshold), settings.host, settings.port)
    return 0

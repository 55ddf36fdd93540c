"""norton demo-video: detect in a video, a camera or a stream, one model or two side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.commands import Output, write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.category_list import lists_of_files
from norton_deploy.errors import INTERRUPTED, UserError, require_least
from norton_deploy.files import check_output_file, refuse_same_file
from norton_deploy.inference.loading import PackagedTask, load_predictor, packaged_detector
from norton_deploy.video.pipeline import VideoPipeline
from norton_deploy.video.sinks import VideoFile, Window
from norton_deploy.video.sources import open_source

SYNTHETIC_FRAMES = 250
SMALLEST_SIDE = 32
FIRST = ("model", "source", "baseline", "show", "score-threshold", "device", "overwrite")


@dataclass(frozen=True)
class Settings(Output):
    """Settings of the demo."""

    out: Path
    """MP4 file to write."""
    model: Path | None = None
    """Checkpoint, .onnx, .engine or a folder of graphs; for synthetic scenes the packaged detector of --task."""
    task: PackagedTask = "mask"
    """Which packaged detector runs without --model: mask or keypoint."""
    source: str = "synthetic"
    """Camera number or device, video file, stream address (rtsp://...) or "synthetic"."""
    baseline: Path | None = None
    """Second model, shown on the left for comparison."""
    show: bool = False
    """Also show the frames in a window; q closes it."""
    max_frames: int | None = None
    """Stop after this many frames (synthetic: 250 unless given)."""
    score_threshold: float = 0.5
    """Detections below this score are not drawn."""
    categories: Path | None = None
    """Categories of a .pth file, which names none: a COCO annotation file or a list of names."""
    device: str | None = None
    """cpu, cuda or cuda:N; a GPU if there is one."""
    image_size: tuple[int, int] = (480, 640)
    """Height and width of synthetic frames."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 on success, 1 when a stream broke for good, 130 after Ctrl-C or SIGTERM (the video is whole)."""
    settings = parse_settings(Settings, argv, prog="demo_video", description=__doc__ or "")
    require_least(1, max_frames=settings.max_frames)
    require_least(SMALLEST_SIDE, image_size=min(settings.image_size))
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    refuse_same_file(settings.out, Path(settings.source), settings.model, settings.baseline)
    check_output_file(settings.out, "--out", overwrite=settings.overwrite)
    limit = settings.max_frames
    if limit is None and settings.source == "synthetic":
        limit = SYNTHETIC_FRAMES
    model = chosen_model(settings)
    files = [model] if settings.baseline is None else [settings.baseline, model]
    labels = ["model"] if settings.baseline is None else ["baseline", "model"]
    categories = lists_of_files(files, settings.categories)
    models = [
        (f"{label} {file.name}", load_predictor(file, device=settings.device, categories=categories.get(file)))
        for label, file in zip(labels, files, strict=True)
    ]
    window = Window() if settings.show else None
    source = open_source(settings.source, settings.image_size)
    with VideoFile(settings.out, source.fps) as output:
        pipeline = VideoPipeline(
            source, models, output, window=window, score_threshold=settings.score_threshold, max_frames=limit
        )
        summary = pipeline.run_until_stopped()
    if output.frames == 0:
        raise UserError(f"{settings.source}: not one frame could be shown ({summary['ended']})")
    write_json(summary, settings.json)
    print(
        f"{output.path}: {summary['frames']['written']} frames, {summary['frames']['dropped']} dropped, "
        f"{summary['frames']['corrupt']} corrupt; ended: {summary['ended']}; "
        f"{json.dumps(summary['pipeline'])}",
        file=sys.stderr,
    )
    if source.problem:
        raise UserError(f"{settings.source}: {source.problem}; what was recorded until then is in {output.path}")
    return INTERRUPTED if summary["ended"] == "interrupted" else 0


def chosen_model(settings: Settings) -> Path:
    """The given model, or the packaged one for synthetic scenes.

    Raises:
        UserError: no model is given for another source, or this installation has none.
    """
    if settings.model is not None:
        return settings.model
    if settings.source != "synthetic":
        raise UserError(
            f"--model: needed for --source {settings.source}; the packaged detectors know drawn scenes only"
        )
    return packaged_detector(settings.task)

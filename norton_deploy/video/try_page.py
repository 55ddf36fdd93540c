"""A page in the browser to try models on: a picture, a clip or the camera, all models side by side with their speed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from norton_deploy.data.image_file import read_image
from norton_deploy.errors import UserError
from norton_deploy.inference.drawing import draw_detections
from norton_deploy.inference.predictor import Image, Predictor
from norton_deploy.structures import Detections
from norton_deploy.video.pipeline import WARM_UP_SIZE, VideoPipeline
from norton_deploy.video.sinks import VideoFile
from norton_deploy.video.sources import open_source

if TYPE_CHECKING:
    import gradio

LONG_SIDE = 1280
"""Larger pictures are made smaller first: what is kept for the slider stays small."""
MOST_FRAMES = 600
MOST_SESSIONS = 8
LARGEST_FILE = "100mb"
SECONDS_BETWEEN_FRAMES = 0.2
LOWEST_SCORE = 0.05
INSTALL = "the page needs one more package: pip install 'norton-deploy[serve]'"

Seen = tuple[Image, list[Detections], list[float]]
"""A picture, what each model found in it and the milliseconds that each took."""


@dataclass(frozen=True)
class Tried:
    """Attributes: what the page calls a model; the model."""

    name: str
    predictor: Predictor


def look(models: Sequence[Tried], image: Image) -> Seen:
    """Run all models on a picture, uint8 RGB [H, W, 3], made smaller than 1280 pixels a side.

    Detections of scores below 0.05 are left out.
    """
    scale = min(1.0, LONG_SIDE / max(image.shape[:2]))
    if scale < 1:
        size = round(image.shape[1] * scale), round(image.shape[0] * scale)
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    found, times_ms = [], []
    for model in models:
        [detections] = model.predictor([image])
        found.append(detections[detections.scores >= LOWEST_SCORE])
        times_ms.append(model.predictor.timing.total_ms)
    return image, found, times_ms


def show(models: Sequence[Tried], threshold: float, seen: Seen | None) -> list[Any]:
    """For each model the picture with its detections of at least `threshold`, then for each a line about it."""
    if seen is None:
        return [None] * len(models) + [""] * len(models)
    image, found, times_ms = seen
    pictures, lines = [], []
    for model, detections, time_ms in zip(models, found, times_ms, strict=True):
        shown = detections[detections.scores >= threshold]
        pictures.append(draw_detections(image, shown, model.predictor.categories))
        lines.append(f"{model.name}: {1e3 / time_ms:.1f} FPS ({time_ms:.0f} ms), {len(shown)} found")
    return [*pictures, *lines]


def film(models: Sequence[Tried], clip: Path, threshold: float, folder: Path) -> tuple[Path, str]:
    """Run all models on a clip, its first 600 frames at most.

    Returns:
        the .mp4 file, made in `folder`, of the models side by side; and a line about the speed of each.

    Raises:
        UserError: it is no video.
    """
    source = open_source(str(clip))
    descriptor, name = tempfile.mkstemp(".mp4", dir=folder)
    os.close(descriptor)
    with VideoFile(Path(name), source.fps) as output:
        summary = VideoPipeline(
            source,
            [(model.name, model.predictor) for model in models],
            output,
            score_threshold=threshold,
            max_frames=MOST_FRAMES,
        ).run()
    if output.frames == 0:
        raise UserError("not one frame of this clip can be read")
    return Path(name), clip_line(summary)


def clip_line(summary: dict[str, Any]) -> str:
    """Of a pipeline's summary: frames, and the speed that each model alone allows."""
    speeds = ", ".join(f"{model['label']} {model['fps']:.1f} FPS" for model in summary["models"])
    return f"{summary['frames']['written']} frames ({summary['ended']}); {speeds}"


def try_page(models: Sequence[Tried], folder: Path, threshold: float = 0.5) -> gradio.Blocks:
    """The page, not yet served.

    Args:
        models: shown from left to right; each is run once first, as its first call is not typical.
        folder: for clips; the caller's to empty.
        threshold: that the slider starts at, 0..1.

    Raises:
        UserError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"{INSTALL}; missing: {error.name}") from error
    for model in models:
        model.predictor([np.zeros((*(model.predictor.input_size or WARM_UP_SIZE), 3), np.uint8)])

    def refusing(work: Callable[[Any, float], Any]) -> Callable[[Any, float], Any]:
        """Show a user's mistake on the page."""

        def call(given: Any, threshold: float) -> Any:
            try:
                return work(given, threshold)
            except UserError as error:
                where = f"{Path(given).parent}{os.sep}" if isinstance(given, str) else ""
                raise gradio.Error(str(error).replace(where, ""), print_exception=False) from error

        return call

    def look_at_file(path: str | None, threshold: float) -> list[Any]:
        seen = None if path is None else look(models, read_image(path))
        return [seen, *show(models, threshold, seen)]

    def look_at_frame(frame: Image | None, threshold: float) -> list[Any]:
        return show(models, threshold, None if frame is None else look(models, frame))

    def look_at_clip(path: str | None, threshold: float) -> tuple[str | None, str]:
        if path is None:
            return None, ""
        made, line = film(models, Path(path), threshold, folder)
        return str(made), line

    def panels(prefix: str) -> list[Any]:
        with gradio.Row():
            columns = [gradio.Column(min_width=280) for _ in models]
        pictures, lines = [], []
        for number, (column, model) in enumerate(zip(columns, models, strict=True)):
            with column:
                picture = gradio.Image(
                    label=model.name, show_label=False, interactive=False, format="jpeg", elem_id=f"{prefix}-{number}",
                    alt_text=f"What {model.name} finds", buttons=["download", "fullscreen"],
                )  # fmt: skip
                pictures.append(picture)
                lines.append(gradio.Textbox(show_label=False, container=False, elem_id=f"{prefix}-speed-{number}"))
        return [*pictures, *lines]

    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
    with gradio.Blocks(title="norton_deploy", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown("# What detectors find")
        slider = gradio.Slider(0.05, 0.95, threshold, step=0.05, label="Least score that is shown", elem_id="threshold")
        with gradio.Tab("Picture"):
            picture = gradio.Image(
                label="Drop a picture here", sources=["upload", "webcam", "clipboard"], height=260, elem_id="picture"
            )
            # the file as it came: one reader decides what is a picture and which way is up
            setattr(picture, "preprocess", lambda file: None if file is None else str(file.path))  # noqa: B010
            seen, shown = gradio.State(), panels("found")
        with gradio.Tab("Clip"):
            clip = gradio.Video(label=f"A clip (its first {MOST_FRAMES} frames)", sources=["upload"], elem_id="clip")
            start = gradio.Button("Detect", variant="primary")
            made = gradio.Video(label="Side by side", interactive=False, autoplay=True, elem_id="film")
            about = gradio.Textbox(show_label=False, container=False, elem_id="film-speed")
        with gradio.Tab("Camera"):
            camera = gradio.Image(label="Camera", sources=["webcam"], streaming=True, height=260)
            live = panels("live")
        picture.change(refusing(look_at_file), [picture, slider], [seen, *shown], **one_at_a_time)
        slider.change(partial(show, models), [slider, seen], shown, trigger_mode="always_last")
        start.click(refusing(look_at_clip), [clip, slider], [made, about], **one_at_a_time)
        camera.stream(
            refusing(look_at_frame), [camera, slider], live, stream_every=SECONDS_BETWEEN_FRAMES, **one_at_a_time
        )
    return page


def serve(page: gradio.Blocks, host: str, port: int | None, *, wait: bool = True) -> str:
    """Serve the page to `host` alone, without telemetry, fonts or links from elsewhere; returns its address.

    Args:
        port: a free one from 7860 on by default.

    Raises:
        UserError: the address is taken or not this machine's.
    """
    import gradio

    plain = gradio.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = page.queue(max_size=16).launch(
            server_name=host, server_port=port, max_file_size=LARGEST_FILE, share=False, quiet=True, theme=plain,
            footer_links=[], run_history=False, ssr_mode=False, enable_monitoring=False, prevent_thread_lock=True,
            state_session_capacity=MOST_SESSIONS,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{host}:{port or 'any port'}: cannot listen here ({error}); choose another --port") from error
    if wait:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return str(address)

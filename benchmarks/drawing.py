"""Drawing and writing a frame with masks: blended inside the boxes and encoded as H.264, against the form before it.

Before: supervision's MaskAnnotator, which blends whole frames, channels swapped by strides, MPEG-4 part 2 through
OpenCV. Both draw the same boxes and labels and write the same clips, in turn; once by the clock, once by the
processor's time of all threads, which other work on the machine changes little. A clip counts from before its file is
opened until it is closed, so that what an encoder still has to do in its own thread counts too.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import supervision as sv

from benchmarks.lib.cells import RESULTS, ResultCells, interval, run, settings_of, tabulate
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.data.synthetic.scene import SyntheticVideo
from norton_deploy.inference.drawing import compose_panels
from norton_deploy.inference.predictor import Image
from norton_deploy.structures import Categories, Detections
from norton_deploy.video.sinks import VideoFile

BEFORE, NOW = "whole frames, MPEG-4", "inside boxes, H.264"
CATEGORIES = Categories((1, 2, 3, 4, 5), (1, 2, 3, 4, 5), ("a", "b", "c", "d", "e"))
FPS = 25.0


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/drawing.py."""

    out: Path = RESULTS / "drawing.json"
    """Results file; a Markdown table is written beside it."""
    image_size: tuple[int, int] = (720, 1280)
    """Height and width of the frames."""
    objects: int = 20
    """Masks in each, 60 to 250 pixels high and wide."""
    frames: int = 25
    """Of a clip."""
    rounds: int = 8
    """Clips of each form."""
    threads: int = 2
    """Of OpenCV; the encoders take the machine's cores."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    cv2.setNumThreads(settings.threads)
    clocks: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
    return ResultCells(settings.out, settings_of(settings), report).measure_all(
        {name: partial(measure, settings, clock) for name, clock in clocks.items()}
    )


def report(results: ResultCells) -> str:
    """Milliseconds a frame and the paired ratio, for each clock."""
    return tabulate(
        "Milliseconds to draw and write a frame, medians, and the paired ratio with its 95 % interval",
        results.cells.items(),
        {
            "Clock": lambda row: row[0],
            BEFORE: lambda row: f"{row[1]['before']['p50_ms']:.1f}",
            NOW: lambda row: f"{row[1]['now']['p50_ms']:.1f}",
            "Ratio": lambda row: interval(row[1]["speedup"]),
        },
    ).to_markdown()


def measure(settings: Settings, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds a frame of both forms, in turn on the same clip."""
    frames = [SyntheticVideo(0, settings.image_size, 6).frame(step / FPS).image for step in range(5)]
    found = draw_objects(settings.image_size, settings.objects)
    height, width = settings.image_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"

        def before(_round: int) -> None:
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (width, height + 48))
            for step in range(settings.frames):
                writer.write(drawn_before(frames[step % len(frames)], found)[:, :, ::-1])
            writer.release()

        def now(_round: int) -> None:
            with VideoFile(path, FPS) as output:
                for step in range(settings.frames):
                    output.write(panel(frames[step % len(frames)], found))

        clips = time_in_turns({BEFORE: before, NOW: now}, rounds=settings.rounds, warm_up=1, clock=clock)
    turns = replace(clips, times_ms=clips.times_ms / settings.frames)
    return {
        "before": turns.summary(BEFORE).to_dict(),
        "now": turns.summary(NOW).to_dict(),
        "speedup": turns.speedup(BEFORE, NOW).to_dict(),
    }


def panel(image: Image, found: Detections) -> Image:
    """The video's panel as the pipeline composes it."""
    return compose_panels(image, [found], [CATEGORIES], ["model: 10 FPS"], 10.0, [50.0, 60.0])


def drawn_before(image: Image, found: Detections) -> Image:
    """The panel with its masks blended over whole frames."""
    scene: Any = np.ascontiguousarray(image[:, :, ::-1])
    scene = sv.MaskAnnotator(opacity=0.45).annotate(scene, found.to_supervision(CATEGORIES), found.labels - 1)
    return panel(np.ascontiguousarray(scene[:, :, ::-1]), replace(found, masks=None))


def draw_objects(image_size: tuple[int, int], count: int) -> Detections:
    """Ellipses of all categories at random places."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(60, 250, (count, 2))
    low = rng.uniform(0, np.array(image_size[::-1]) - sides)
    boxes = np.concatenate([low, low + sides], axis=1).astype(np.float32)
    masks = np.zeros((count, *image_size), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        y, x = np.mgrid[-1 : 1 : (y2 - y1) * 1j, -1 : 1 : (x2 - x1) * 1j]
        mask[y1:y2, x1:x2] = x**2 + y**2 < 1
    labels = rng.integers(1, 6, count)
    return Detections(boxes, np.linspace(0.99, 0.5, count).astype(np.float32), labels, image_size, masks)


if __name__ == "__main__":
    run(Settings, main)

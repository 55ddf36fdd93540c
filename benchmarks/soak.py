"""Does memory stay flat? Thousands of predictions in each backend, and an hour of synthetic video by the clock.

Every cell runs in a process of its own, with the packaged mask detector at a small image size. Growth is the largest
resident memory after the first samples, less that after them: for predictions after the first 100, for video after the
first minute.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av

from benchmarks.lib.cells import RESULTS, ResultCells, run, settings_of, tabulate
from norton_deploy.checkpoints.checkpoint import build_structure, load_weights
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.compression.lowering import lower_model
from norton_deploy.export.onnx_export import export_onnx
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.inference.loading import load_predictor, packaged_detector
from norton_deploy.inference.predictor import Backend, Image, Predictor
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.video.pipeline import VideoPipeline
from norton_deploy.video.sinks import VideoFile
from norton_deploy.video.sources import FrameSource, SyntheticSource

BACKENDS: tuple[Backend, ...] = ("torch", "onnxruntime", "openvino")
"""An engine of TensorRT needs a GPU."""
SAMPLE_EVERY, FLAT_MIB, PROPOSALS = 100, 20.0, 50


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/soak.py."""

    out: Path = RESULTS / "soak.json"
    """Results file; a Markdown table is written beside it."""
    work: Path = Path("runs/soak")
    """Folder for the graph and the recording."""
    only: tuple[str, ...] = ()
    """Run these cells only: torch, onnxruntime, openvino, video."""
    predictions: int = 2000
    """In each backend."""
    video_minutes: float = 60.0
    """How long the video runs."""
    video_fps: float = 5.0
    """Its frames a second; the source waits for the clock, as a camera does."""
    image_size: tuple[int, int] = (128, 160)
    """Height and width of detectors and frames."""


class PacedScenes(FrameSource):
    """Synthetic scenes by the clock; samples the process's memory once every `SAMPLE_EVERY` frames."""

    name, is_live = "synthetic, by the clock", True

    def __init__(self, image_size: tuple[int, int], fps: float, seconds: float) -> None:
        self._scenes, self.fps, self._seconds = SyntheticSource(image_size), fps, seconds
        self._frames, self._started = 0, 0.0
        self.memory_mib: list[float] = []

    def read(self) -> Image | None:
        if self._frames == 0:
            self._started = time.monotonic()
        time.sleep(max(0.0, self._started + self._frames / self.fps - time.monotonic()))
        if self._frames > self._seconds * self.fps:
            return None
        if self._frames % SAMPLE_EVERY == 0:
            self.memory_mib.append(resident_mib())
        self._frames += 1
        return self._scenes.read()


def main(settings: Settings) -> int:
    """Run what is missing; status 1 when memory grew."""
    settings.work.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: partial(in_new_process, predict_often, settings, name) for name in BACKENDS},
        "video": partial(in_new_process, record, settings),
    }
    chosen = {name: cell for name, cell in cells.items() if name in (settings.only or cells)}
    return ResultCells(settings.out, settings_of(settings, "only"), report).measure_all(chosen)


def report(results: ResultCells) -> str:
    """Memory of each cell."""
    return tabulate(
        "Resident memory in MiB: after the first 100 predictions or the first minute, and the most it grew from there",
        results.cells.items(),
        {
            "What": lambda row: row[0],
            "How long": lambda row: row[1]["length"],
            "MiB": lambda row: f"{row[1]['memory_mib']:.0f}",
            "Growth": lambda row: f"{row[1]['growth_mib']:.1f}",
        },
    ).to_markdown()


def in_new_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `work` returns in a fresh interpreter, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def predict_often(settings: Settings, backend: Backend) -> dict[str, Any]:
    """Predictions one by one on moving scenes, memory every 100."""
    predictor, source = small_predictor(settings, backend), SyntheticSource(settings.image_size)
    samples, found = [], 0
    for index in range(settings.predictions):
        found += len(predictor([source.read()])[0])
        if (index + 1) % SAMPLE_EVERY == 0:
            samples.append(resident_mib())
    return {"length": f"{settings.predictions} predictions", "detections": found, **growth(samples, 0)}


def record(settings: Settings) -> dict[str, Any]:
    """The whole pipeline by the clock: source, ONNX Runtime, drawing, recording; the recording is read back."""
    seconds, path = 60 * settings.video_minutes, settings.work / "soak.mp4"
    source = PacedScenes(settings.image_size, settings.video_fps, seconds)
    with VideoFile(path, source.fps) as output:
        summary = VideoPipeline(source, [("model", small_predictor(settings, "onnxruntime"))], output).run()
    with av.open(path) as recording:
        read_back = sum(1 for _ in recording.decode(video=0))
    first = min(round(60 * settings.video_fps / SAMPLE_EVERY), len(source.memory_mib) - 2)
    result = {
        "length": f"{settings.video_minutes:g} minutes, {summary['frames']['captured']} frames",
        "frames": {**summary["frames"], "recorded": output.frames, "read_back": read_back},
        "recording_mib": round(path.stat().st_size / 2**20, 1),
        "ended": summary["ended"],
        **growth(source.memory_mib, first),
    }
    if read_back != output.frames:
        result["failure"] = f"{output.frames} frames were recorded and {read_back} can be read back"
    return result


def small_predictor(settings: Settings, backend: Backend) -> Predictor:
    """The packaged mask detector for small images, with few proposals."""
    opened = open_model(str(packaged_detector("mask")), image_size=settings.image_size)
    detector, categories = opened.header.detector, opened.header.categories
    rpn = replace(detector.rpn, pre_nms=(PROPOSALS, PROPOSALS), post_nms=(PROPOSALS, PROPOSALS))
    small = build_structure(replace(opened.header, settings=replace(detector, rpn=rpn)))
    load_weights(small, opened.model.state_dict(), "the packaged detector")
    model = lower_model(small.eval())
    if backend == "torch":
        return TorchPredictor(model, "mask", categories, device="cpu")
    path = settings.work / "soak.onnx"
    export_onnx(StaticRCNN(model, GraphSettings(settings.image_size)), path, categories=categories)
    return load_predictor(path, backend=backend, device="cpu")


def growth(samples_mib: list[float], first: int) -> dict[str, Any]:
    """Memory at sample `first`, and by how much the largest later one exceeds it; too much is a failure."""
    grown = max(samples_mib[first:]) - samples_mib[first]
    result = {"memory_mib": samples_mib[first], "growth_mib": round(grown, 2), "samples_mib": samples_mib}
    return {**result, "failure": f"memory grew by {grown:.0f} MiB"} if grown >= FLAT_MIB else result


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 2**20, 2)


if __name__ == "__main__":
    run(Settings, main)

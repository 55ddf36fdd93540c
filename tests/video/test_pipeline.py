"""The video pipeline: real MP4 files, damage, dropping, interruption."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from norton_deploy.commands import run
from norton_deploy.errors import UserError
from norton_deploy.inference.drawing import BAR_HEIGHT
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import Predictor, StageTiming
from norton_deploy.structures import Categories, Detections
from norton_deploy.video.pipeline import VideoPipeline
from norton_deploy.video.sinks import VideoFile, Window
from norton_deploy.video.sources import (
    FrameSource,
    open_source,
)

SIZE = (96, 128)


def frame(index: int) -> np.ndarray:
    """Black with a white square that moves 4 px per frame."""
    image = np.zeros((*SIZE, 3), np.uint8)
    image[30:60, 4 * index : 4 * index + 30] = 255
    return image


def write_video(path: Path, count: int = 12) -> Path:
    with VideoFile(path, 10.0) as output:
        for index in range(count):
            output.write(frame(index))
    return path


def read_video(path: Path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (step := capture.read())[0]:
        frames.append(step[1][:, :, ::-1])
    capture.release()
    return frames


class FakePredictor(Predictor):
    """Finds nothing; `before` is called for every frame."""

    name, backend, task, device, input_size = "fake", "torch", "box", "none", SIZE
    categories = Categories((1,), (7,), ("lamp",))

    def __init__(self, before=lambda image: None) -> None:
        self.before = before

    def _detect(self, images):
        self.timing = StageTiming(infer_ms=1.0)
        for image in images:
            self.before(image)
        empty = np.zeros((0, 4), np.float32)
        return [Detections(empty, empty[:, 0], empty[:, 0].astype(np.int64), image.shape[:2]) for image in images]


class ScriptedSource(FrameSource):
    """Frames from a generator."""

    name = "script"

    def __init__(self, frames: Iterator[np.ndarray], live: bool) -> None:
        self._frames = frames
        self.is_live = live

    def read(self):
        return next(self._frames, None)


def test_demo_writes_an_annotated_video_of_every_frame(graph, tmp_path):
    source = write_video(tmp_path / "in.mp4")
    model = graph(image_size=SIZE)
    arguments = ["--model", str(model), "--source", str(source), "--out", str(tmp_path / "out.mp4")]
    assert run("demo_video", [*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    frames = read_video(tmp_path / "out.mp4")
    assert len(frames) == 12
    assert frames[0].shape == (SIZE[0] + 2 * BAR_HEIGHT, SIZE[1], 3)
    for index, shown in enumerate(frames):
        plain = frame(index)
        drawn = shown[BAR_HEIGHT : BAR_HEIGHT + SIZE[0]].astype(int)
        difference = np.abs(drawn - plain).max(axis=2)
        x, y = 4 * index, 30
        # A coloured frame round the square; its inside and the far background stay as they were.
        assert (difference[y + 29 : y + 32, x + 5 : x + 25].max(axis=0) > 60).all()
        assert (difference[75:, :] < 40).all()
        assert (difference[y + 8 : y + 22, x + 8 : x + 22] < 40).all()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["frames"] == {"captured": 12, "written": 12, "dropped": 0, "corrupt": 0}
    assert figures["ended"] == "end of the source" and not figures["live"]
    assert figures["pipeline"]["fps"] > 0 and figures["models"][0]["fps"] > 0
    latency_ms = figures["pipeline"]["capture_to_display_ms"]
    assert 0 < latency_ms["p50"] <= latency_ms["p95"]


def test_baseline_stands_beside_the_model(graph, tmp_path):
    source = write_video(tmp_path / "in.mp4", 4)
    one, other = graph("one.onnx", image_size=SIZE), graph("other.onnx", image_size=(48, 64))
    arguments = ["--model", str(one), "--baseline", str(other), "--source", str(source), "--max-frames", "3"]
    figures = tmp_path / "figures.json"
    assert run("demo_video", [*arguments, "--out", str(tmp_path / "out.mp4"), "--json", str(figures)]) == 0
    frames = read_video(tmp_path / "out.mp4")
    assert len(frames) == 3 and frames[0].shape[1] == 2 * SIZE[1]
    summary = json.loads(figures.read_text())
    assert [entry["label"] for entry in summary["models"]] == ["baseline other.onnx", "model one.onnx"]
    assert summary["ended"] == "frame limit" and summary["frames"]["written"] == 3


def test_damaged_files(graph, tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 40).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[:1000])  # no frame is whole
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for path, message in [(cut, "cannot read"), (text, "cannot read"), (tmp_path / "absent.mp4", "no such")]:
        with pytest.raises(UserError, match=message):
            open_source(str(path))
    # Damage in the picture data: the decoder conceals what it can, nothing may crash and no frame repeats.
    rotten = bytearray(whole)
    noise = np.random.default_rng(0)
    start = whole.index(b"mdat")
    length = int.from_bytes(whole[start - 4 : start])
    for position in noise.integers(start + 64, start + length - 8, length // 50):
        rotten[position] = noise.integers(256)
    (tmp_path / "rotten.mp4").write_bytes(bytes(rotten))
    out, figures = tmp_path / "out.mp4", tmp_path / "f.json"
    arguments = ["--model", str(graph(image_size=SIZE)), "--source", str(tmp_path / "rotten.mp4")]
    assert run("demo_video", [*arguments, "--out", str(out), "--json", str(figures)]) == 0
    frames = json.loads(figures.read_text())["frames"]
    assert frames["written"] + frames["corrupt"] == 40 and frames["written"] == len(read_video(out))


def run_slow(tmp_path: Path, live: bool) -> tuple[dict, list[int]]:
    """Ten frames against a predictor that holds on to frame 0 until a live source has sent all of them."""
    started, release = threading.Event(), threading.Event()
    seen: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        yield frame(0)
        assert started.wait(10)
        yield from (frame(index) for index in range(1, 10))
        release.set()

    def slow(image: np.ndarray) -> None:
        if not image.any():
            return  # the warm-up
        seen.append(int(image.any(axis=(0, 2)).argmax()) // 4)
        started.set()
        assert not live or release.wait(10)

    with VideoFile(tmp_path / "out.mp4", 10.0) as output:
        pipeline = VideoPipeline(ScriptedSource(frames(), live), [("fake", FakePredictor(slow))], output)
        return pipeline.run(), seen


def test_live_source_drops_old_frames_when_inference_is_slow(tmp_path):
    summary, seen = run_slow(tmp_path, live=True)
    assert seen == [0, 8, 9]
    assert summary["frames"] == {"captured": 10, "written": 3, "dropped": 7, "corrupt": 0}
    assert len(read_video(tmp_path / "out.mp4")) >= 1  # as many as its seconds hold


def test_a_recording_by_the_clock_plays_in_real_time(tmp_path):
    with VideoFile(tmp_path / "out.mp4", 10.0) as output:
        for index, time_s in enumerate((0.0, 0.02, 0.5, 0.6)):  # the second comes before its turn
            output.write(frame(4 * index), time_s)
    lit = [np.flatnonzero(picture[45].mean(axis=1) > 128) for picture in read_video(tmp_path / "out.mp4")]
    squares = [round((float(columns.mean()) - 15) / 16) for columns in lit]
    assert squares == [0, 0, 0, 0, 0, 2, 3]


def test_a_recording_is_not_replaced_by_its_own_drawing(graph, tmp_path, capsys):
    video = write_video(tmp_path / "v.mp4")
    before = video.read_bytes()
    model = str(graph(image_size=SIZE))
    assert run("demo_video", ["--model", model, "--source", str(video), "--out", str(video)]) == 1
    assert "would be lost" in capsys.readouterr().err and video.read_bytes() == before
    for size in (["0", "0"], ["-5", "100"]):
        assert run("demo_video", ["--model", model, "--image-size", *size, "--out", str(tmp_path / "o.mp4")]) == 1
        assert "--image-size: expected at least 32" in capsys.readouterr().err


def test_a_graph_runs_where_torch_is_not_installed(graph, tmp_path):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'torchvision'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from norton_deploy.commands import run\n"
        "sys.exit(run(sys.argv[1], sys.argv[2:]))"
    )
    cv2.imwrite(str(tmp_path / "a.png"), frame(0))
    model = str(graph(image_size=SIZE))
    for name, arguments in [
        ("demo_video", ["--image-size", "96", "128", "--max-frames", "2", "--out", str(tmp_path / "o.mp4")]),
        ("predict", ["--images", str(tmp_path / "a.png"), "--out", str(tmp_path / "o")]),
    ]:
        command = [sys.executable, "-c", code, name, "--model", model, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_file_source_never_drops(tmp_path):
    summary, seen = run_slow(tmp_path, live=False)
    assert seen == list(range(10))
    assert summary["frames"]["dropped"] == 0 and summary["frames"]["written"] == 10


def test_an_error_in_a_stage_reaches_the_caller_and_the_file_is_closed(tmp_path):
    def fails(image: np.ndarray) -> None:
        if image[:, 20].any() and not image[:, 8].any():  # frame 3
            raise UserError("no such luck")

    source = ScriptedSource((frame(index) for index in range(8)), live=False)
    threads = threading.active_count()
    with pytest.raises(UserError, match="no such luck"), VideoFile(tmp_path / "out.mp4", 10.0) as output:
        VideoPipeline(source, [("fake", FakePredictor(fails))], output).run()
    assert not list(tmp_path.glob(".*"))
    assert threading.active_count() == threads


def test_output_mistakes(tmp_path, monkeypatch):
    for name, message in [("out.avi", "called .mp4"), ("absent/out.mp4", "cannot write")]:
        with pytest.raises(UserError, match=message):
            VideoFile(tmp_path / name, 25.0)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if sys.platform.startswith("linux"):
        with pytest.raises(UserError, match="no display"):
            Window()


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path):
    with VideoFile(tmp_path / "out.mp4", 10.0) as output:
        output.write(frame(0))
        output.write(np.full((200, 200, 3), 255, np.uint8))
    frames = read_video(tmp_path / "out.mp4")
    assert [one.shape for one in frames] == [(*SIZE, 3)] * 2 and frames[1].min() > 200


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demo_leaves_a_whole_video(graph, tmp_path, stop):
    out, figures = tmp_path / "out.mp4", tmp_path / "figures.json"
    command = [
        sys.executable,
        "-c",
        "from norton_deploy.commands import run; import sys; sys.exit(run('demo_video'))",
    ]
    command += ["--model", str(graph(image_size=SIZE)), "--source", "synthetic", "--max-frames", "1000000"]
    command += ["--image-size", "96", "128", "--out", str(out), "--json", str(figures)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        waited = threading.Event()
        for _ in range(600):  # until some frames are on the disk
            if any(partial.stat().st_size > 20_000 for partial in tmp_path.glob(".out.*.partial.mp4")):
                break
            waited.wait(0.1)
        process.send_signal(stop)
        _, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, messages
    assert "Traceback" not in messages
    summary = json.loads(figures.read_text())
    assert summary["ended"] == "interrupted"
    assert len(read_video(out)) == summary["frames"]["written"] > 0
    assert not list(tmp_path.glob(".*"))


def test_predictor_runs_on_synthetic_frames(graph):
    [found] = load_predictor(graph(image_size=SIZE))([open_source("synthetic", SIZE).read()])
    assert found.image_size == SIZE

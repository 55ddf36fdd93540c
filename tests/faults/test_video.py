"""Video: kills and full disks while recording, streams that stall or break off, cameras that hang."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest

from norton_deploy.inference.predictor import Predictor
from norton_deploy.structures import Categories, Detections
from norton_deploy.video.captures import READ_TIMEOUT_S, StreamCapture
from norton_deploy.video.pipeline import VideoPipeline
from norton_deploy.video.sinks import VideoFile
from norton_deploy.video.sources import FileSource, LiveSource, RetryPolicy

ROOT = Path(__file__).parents[2]
SIZE, FPS = (96, 128), 10.0


class Blind(Predictor):
    """Finds nothing."""

    name, backend, task, device, input_size = "blind", "torch", "box", "none", SIZE
    categories = Categories((1,), (7,), ("lamp",))

    def _detect(self, images):
        empty = np.zeros((0, 4), np.float32)
        return [Detections(empty, empty[:, 0], empty[:, 0].astype(np.int64), image.shape[:2]) for image in images]


def brightness(path: Path) -> list[float]:
    """Of each frame that can be decoded."""
    source, shown = FileSource.open(path), []
    while (frame := source.read()) is not None:
        shown.append(float(frame.mean()))
    return shown


RECORD = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from norton_deploy.errors import UserError
    from norton_deploy.video.sinks import VideoFile
    noise, limit = np.random.default_rng(0), int(sys.argv[2])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with VideoFile(Path(sys.argv[1]), 10.0) as output:
            for index in range(1000):
                frame = noise.integers(0, 60, (96, 128, 3)).astype(np.uint8)
                output.write(frame + np.uint8(index))
                print(index + 1, flush=True)
                if not limit and index == 99:
                    sys.stdin.readline()  # until the kill
    except UserError as error:
        print(error)
        sys.exit(1)
"""


def record(path: Path, limit: int = 0) -> subprocess.Popen[str]:
    """A process that records: frame k has brightness k and some noise."""
    command = [sys.executable, "-c", textwrap.dedent(RECORD), str(path), str(limit)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **pipes)


def test_a_killed_recording_plays_to_the_last_second_but_one(tmp_path):
    process = record(tmp_path / "out.mp4")
    for line in process.stdout:
        if line == "100\n":
            break
    process.kill()
    process.communicate()
    [partial] = tmp_path.iterdir()
    shown = brightness(partial)
    assert len(shown) >= 100 - 2 * FPS
    assert np.abs(np.diff(shown) - 1).max() < 1  # every frame in turn


def test_a_recording_that_fills_the_disk_keeps_what_fitted(tmp_path):
    process = record(tmp_path / "out.mp4", limit=200_000)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and not errors
    lines = said.splitlines()
    assert lines[-1].startswith(f"{tmp_path}/out.mp4: cannot be written any further (File too large)")
    written, [path] = int(lines[-2]), list(tmp_path.iterdir())
    assert path.name == "out.mp4" and len(brightness(path)) >= written - 3 * FPS > 0


def test_a_recording_never_writes_through_what_lies_there(tmp_path):
    secret, trap = tmp_path / "secret", tmp_path / ".out.partial.mp4"
    secret.write_text("mine")
    trap.symlink_to(secret)
    for _ in range(2):
        with VideoFile(tmp_path / "out.mp4", FPS) as output:
            output.write(np.zeros((*SIZE, 3), np.uint8))
    assert secret.read_text() == "mine" and trap.is_symlink()
    (tmp_path / "out.mp4").unlink()
    (tmp_path / "out.mp4").symlink_to(secret)
    with VideoFile(tmp_path / "out.mp4", FPS) as output:
        output.write(np.zeros((*SIZE, 3), np.uint8))
    assert secret.read_text() == "mine" and not (tmp_path / "out.mp4").is_symlink()


@pytest.fixture
def clip(tmp_path) -> bytes:
    """Ten frames as an MPEG transport stream, which can be joined anywhere."""
    path = tmp_path / "clip.ts"
    with av.open(path, "w", format="mpegts") as container:
        video = container.add_stream("mpeg2video", 25)
        video.width, video.height, video.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        for index in range(10):
            picture = av.VideoFrame.from_ndarray(np.full((*SIZE, 3), 20 * index, np.uint8), format="rgb24")
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
    return path.read_bytes()


@contextmanager
def served(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server that answers every request by `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "video/mp2t")
            self.end_headers()
            answer(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/live.ts"
    finally:
        server.shutdown()


def test_a_stream_that_is_cut_twenty_times_goes_on(clip):
    with served(lambda request: request.wfile.write(clip)) as address:
        retry = RetryPolicy(limit=3, sleep=lambda seconds: None)
        source = LiveSource(address, lambda: StreamCapture(address, network=True), retry)
        frames = 0
        while source.reconnects < 20:
            assert source.read() is not None
            frames += 1
        source.close()
    assert frames >= 180 and source.corrupt_frames == 0 and not source.problem


def stop_while_it_hangs(source: LiveSource, out: Path, hangs: Callable[[], bool]) -> dict:
    """Run the pipeline until the source hangs, then stop it as a signal does; it must not wait for the source."""
    with VideoFile(out, FPS) as output:
        pipeline = VideoPipeline(source, [("blind", Blind())], output)
        summaries: list[dict] = []
        thread = threading.Thread(target=lambda: summaries.append(pipeline.run()), daemon=True)
        thread.start()
        while not (hangs() and output.frames):
            assert thread.is_alive()
            threading.Event().wait(0.02)
        pipeline.interrupt()
        thread.join(0.7 * READ_TIMEOUT_S)
        assert not thread.is_alive()
    return summaries[0]


@pytest.mark.slow
def test_a_stream_that_stalls_does_not_hold_up_the_end(clip, tmp_path):
    stalled, release = threading.Event(), threading.Event()

    def stall(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(clip)
        stalled.set()
        release.wait(60)

    with served(stall) as address:
        source = LiveSource(address, lambda: StreamCapture(address, network=True))
        summary = stop_while_it_hangs(source, tmp_path / "out.mp4", stalled.is_set)
        release.set()
    assert summary["ended"] == "interrupted" and brightness(tmp_path / "out.mp4")


def test_a_camera_that_hangs_does_not_hold_up_the_end(tmp_path):
    hanging, release = threading.Event(), threading.Event()

    class Camera:
        fps, announced, closed = FPS, 0, False

        def read(self):
            if self.frames:
                return self.frames.pop()
            hanging.set()
            release.wait(60)
            return None

        def close(self):
            assert release.is_set(), "closed while it is read"
            self.closed = True

    camera = Camera()
    camera.frames = [np.zeros((*SIZE, 3), np.uint8)] * 2
    source = LiveSource("camera", lambda: camera, RetryPolicy(limit=0))
    assert stop_while_it_hangs(source, tmp_path / "out.mp4", hanging.is_set)["ended"] == "interrupted"
    release.set()

"""Frame sources: the synthetic one, files and streams with faults, cameras."""

from pathlib import Path

import numpy as np
import pytest

from norton_deploy.errors import UserError
from norton_deploy.video.captures import CorruptFrameError, StreamCapture
from norton_deploy.video.sinks import VideoFile
from norton_deploy.video.sources import FileSource, LiveSource, RetryPolicy, open_source

SIZE = (96, 128)


def frame(index: int) -> np.ndarray:
    """A frame that is `index` all over."""
    return np.full((*SIZE, 3), index, np.uint8)


class FakeCapture:
    """A capture with a script: an array is a frame, None a corrupt one, "break" the end."""

    fps = 30.0

    def __init__(self, script: list, announced: int = 0) -> None:
        self.script = list(script)
        self.announced = announced
        self.closed = False

    def read(self):
        current = self.script.pop(0) if self.script else "break"
        if current is None:
            raise CorruptFrameError
        return None if isinstance(current, str) else current

    def close(self) -> None:
        self.closed = True


def test_synthetic_source_moves_and_repeats():
    first, second = open_source("synthetic", SIZE), open_source("synthetic", SIZE)
    frames = [first.read() for _ in range(3)]
    assert frames[0].shape == (*SIZE, 3) and frames[0].dtype == np.uint8
    assert (frames[0] != frames[2]).any()
    np.testing.assert_array_equal(frames[0], second.read())
    first._frames = round(first.SCENE_S * first.fps)  # the next scene
    assert (first.read() != frames[0]).mean() > 0.3


def test_corrupt_frames_are_counted_and_skipped():
    good = frame(0)
    capture = FakeCapture([good, None, None, good, good, "break"], announced=8)
    source = FileSource("tape.mp4", capture)
    count = 0
    while source.read() is not None:
        count += 1
    # Two that cannot be decoded; three more announced frames never came.
    assert (count, source.corrupt_frames, source.problem) == (3, 5, "")
    endless = FileSource("tape.mp4", FakeCapture([None] * 300, announced=300))
    assert endless.read() is None and endless.corrupt_frames == 100 and "100 frames" in endless.problem


def test_broken_stream_is_reconnected_with_backoff_up_to_the_limit():
    waits: list[float] = []
    retry = RetryPolicy(limit=4, first_delay_s=0.5, longest_delay_s=1.5, sleep=waits.append)
    tapes = [FakeCapture([frame(0)]), None, FakeCapture([frame(1), None, frame(2)]), *[None] * 5]
    first = tapes[0]

    def connect() -> FakeCapture:
        tape = tapes.pop(0)
        if tape is None:
            raise UserError("rtsp://door: cannot open")
        return tape

    source = LiveSource("rtsp://door", connect, retry)
    for index in range(3):
        np.testing.assert_array_equal(source.read(), frame(index))
    assert waits == [0.5, 1.0] and source.reconnects == 1 and source.corrupt_frames == 1
    assert source.read() is None
    assert waits[2:] == [0.5, 1.0, 1.5, 1.5] and "4 attempts" in source.problem and first.closed
    with pytest.raises(UserError, match="rtsp://door: cannot open"):
        LiveSource("rtsp://door", connect)


def test_a_camera_may_be_named_by_its_device():
    with pytest.raises(UserError, match="/dev/null: cannot open this camera"):
        open_source("/dev/null")


def test_a_film_that_was_held_sideways_is_turned_upright(tmp_path: Path):
    path = tmp_path / "phone.mp4"
    shown = np.zeros((*SIZE, 3), np.uint8)
    shown[:48, :64] = (255, 0, 0)  # red: upper left
    with VideoFile(path, 10.0) as output:
        output.write(shown)
    one, matrix = (1 << 16).to_bytes(4, "big"), path.read_bytes()
    start = matrix.rindex(b"tkhd") + 4 + 40  # of the matrix a b u c d v x y w
    assert matrix[start : start + 4] == one
    # b = 1 and c = -1: by 90 degrees clockwise
    turn = b"\0" * 4 + one + b"\0" * 4 + (-(1 << 16) & 0xFFFFFFFF).to_bytes(4, "big") + b"\0" * 8
    path.write_bytes(matrix[:start] + turn + matrix[start + 24 :])
    image = StreamCapture(str(path)).read()
    assert image.shape == (SIZE[1], SIZE[0], 3)
    red = image[:, :, 0] > 128
    assert red[:60, 52:].all() and not red[68:].any() and not red[:, :44].any()  # upper right


def test_a_playlist_is_no_video(tmp_path: Path):
    for name, text in [
        ("list.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile /etc/passwd\n"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            open_source(str(tmp_path / name))

"""Frame sources: the synthetic one, files and streams with faults, cameras."""

import cv2
import numpy as np
import pytest

from norton_deploy.errors import UserError
from norton_deploy.video.sources import FileSource, LiveSource, RetryPolicy, open_source

SIZE = (96, 128)


def frame(index: int) -> np.ndarray:
    """A frame that is `index` all over."""
    return np.full((*SIZE, 3), index, np.uint8)


class FakeCapture:
    """A cv2.VideoCapture with a script: an array is a frame, None a corrupt one, "break" a failed grab."""

    def __init__(self, script: list, announced: int = 0, opens: bool = True) -> None:
        self.script = list(script)
        self.announced = announced
        self.opens = opens
        self.current = None

    def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
        return self.opens

    def grab(self) -> bool:
        if not self.opens or not self.script:
            return False
        self.current = self.script.pop(0)
        return not isinstance(self.current, str)

    def retrieve(self):
        return self.current is not None, self.current

    def get(self, property_id: int) -> float:
        return {cv2.CAP_PROP_FPS: 30.0, cv2.CAP_PROP_FRAME_COUNT: self.announced}[property_id]

    def release(self) -> None:
        self.opens = False


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
    gray = good[:, :, 0]
    capture = FakeCapture([good, None, gray, good, "break", good], announced=8)
    source = FileSource("tape.mp4", capture)
    count = 0
    while source.read() is not None:
        count += 1
    # None, the gray frame and the failed grab; two announced frames never came.
    assert (count, source.corrupt_frames, source.problem) == (3, 5, "")
    endless = FileSource("tape.mp4", FakeCapture([None] * 300, announced=300))
    assert endless.read() is None and endless.corrupt_frames == 100 and "100 frames" in endless.problem


def test_broken_stream_is_reconnected_with_backoff_up_to_the_limit():
    waits: list[float] = []
    retry = RetryPolicy(limit=4, first_delay_s=0.5, longest_delay_s=1.5, sleep=waits.append)
    tapes = [FakeCapture([frame(0)]), FakeCapture([], opens=False), FakeCapture([frame(1), None, frame(2)])]
    tapes += [FakeCapture([], opens=False) for _ in range(4)]
    source = LiveSource("rtsp://door", lambda: tapes.pop(0), retry)
    for index in range(3):
        np.testing.assert_array_equal(source.read(), frame(index))
    assert waits == [0.5, 1.0] and source.reconnects == 1 and source.corrupt_frames == 1
    assert source.read() is None
    assert waits[2:] == [0.5, 1.0, 1.5, 1.5] and "4 attempts" in source.problem
    with pytest.raises(UserError, match="rtsp://door: cannot open"):
        LiveSource("rtsp://door", lambda: FakeCapture([], opens=False))


def test_a_camera_may_be_named_by_its_device():
    with pytest.raises(UserError, match="/dev/null: cannot open this camera"):
        open_source("/dev/null")

"""Where video frames come from: files, cameras, network streams, moving synthetic scenes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from norton_deploy.data.synthetic.scene import SyntheticVideo
from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Image

NETWORK_SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "http://", "https://", "udp://", "tcp://")
DEFAULT_FPS = 25.0
MAX_BAD_FRAMES_IN_A_ROW = 100


class VideoCapture(Protocol):
    """The part of cv2.VideoCapture that the sources use."""

    def isOpened(self) -> bool: ...  # noqa: N802 - OpenCV's name

    def grab(self) -> bool: ...

    def retrieve(self) -> tuple[bool, np.ndarray | None]: ...

    def get(self, property_id: int) -> float: ...

    def release(self) -> None: ...


class FrameSource(ABC):
    """Frames one after another.

    Attributes:
        name: what the user called it.
        is_live: frames arrive by the clock whether they are wanted or not.
        fps: nominal frame rate.
        corrupt_frames: frames that could not be decoded and were skipped, so far.
        reconnects: how often a live source was opened again.
        problem: why the source ended early, "" if it came to its end.
    """

    name: str
    is_live: bool = False
    fps: float = DEFAULT_FPS
    corrupt_frames: int = 0
    reconnects: int = 0
    problem: str = ""

    @abstractmethod
    def read(self) -> Image | None:
        """The next frame, uint8 RGB [H, W, 3], or None at the end."""

    def close(self) -> None:  # noqa: B027 - nothing to release is a fine default
        """Release the device or file."""


def _decode(capture: VideoCapture) -> Image | None:
    """The grabbed frame as RGB, or None if it cannot be decoded."""
    decoded, frame = capture.retrieve()
    if not decoded or frame is None or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        return None
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)


class FileSource(FrameSource):
    """A video file. A frame that cannot be decoded is counted and skipped.

    OpenCV does not tell damage from the end of a file, so frames that the file's header announces but that
    never come count as corrupt; damage that the decoder conceals cannot be seen.
    """

    def __init__(self, name: str, capture: VideoCapture) -> None:
        self.name = name
        self._capture = capture
        fps = capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else DEFAULT_FPS
        self._announced = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self._position = 0

    @classmethod
    def open(cls, path: Path) -> FileSource:
        """Open a file.

        Raises:
            UserError: it is missing, or is no video that OpenCV can read (a recording that was cut off
                before its index was written is such a case).
        """
        if not path.is_file():
            raise UserError(f"{path}: no such video file")
        capture = cv2.VideoCapture(str(path))
        if not capture.isOpened():
            raise UserError(f"{path}: OpenCV cannot read this video (damaged, cut off, or an unknown format)")
        return cls(str(path), capture)

    def read(self) -> Image | None:
        bad_in_a_row = 0
        while bad_in_a_row < MAX_BAD_FRAMES_IN_A_ROW:
            grabbed = self._capture.grab()
            if not grabbed and self._position >= self._announced:
                return None
            self._position += 1
            frame = _decode(self._capture) if grabbed else None
            if frame is not None:
                return frame
            self.corrupt_frames += 1
            bad_in_a_row += 1
        self.problem = f"{MAX_BAD_FRAMES_IN_A_ROW} frames in a row could not be decoded"
        return None

    def close(self) -> None:
        self._capture.release()


@dataclass
class RetryPolicy:
    """How a live source that broke is opened again.

    Attributes:
        limit: attempts in a row before giving up.
        first_delay_s: wait before the first attempt; doubles each time.
        longest_delay_s: the wait never exceeds this.
        sleep: replaced by tests.
    """

    limit: int = 5
    first_delay_s: float = 0.5
    longest_delay_s: float = 10.0
    sleep: Callable[[float], None] = field(default=time.sleep)

    def wait(self, attempt: int) -> None:
        """Wait before attempt 0, 1, ..."""
        self.sleep(min(self.first_delay_s * 2**attempt, self.longest_delay_s))


class LiveSource(FrameSource):
    """A camera or network stream; when it breaks it is opened again, up to the retry limit."""

    is_live = True

    def __init__(self, name: str, connect: Callable[[], VideoCapture], retry: RetryPolicy | None = None) -> None:
        """Connect once.

        Args:
            name: what to call it in messages.
            connect: opens the stream.
            retry: when and how often to reconnect.

        Raises:
            UserError: the first connection fails; a wrong address should not be retried.
        """
        self.name = name
        self._connect = connect
        self._retry = retry or RetryPolicy()
        self._capture = connect()
        if not self._capture.isOpened():
            raise UserError(f"{name}: cannot open this camera or stream; is it there and free?")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else DEFAULT_FPS

    def read(self) -> Image | None:
        bad_in_a_row = attempts = 0
        while True:
            if self._capture.grab() and bad_in_a_row < MAX_BAD_FRAMES_IN_A_ROW:
                frame = _decode(self._capture)
                if frame is not None:
                    return frame
                self.corrupt_frames += 1
                bad_in_a_row += 1
                continue
            self._capture.release()
            if attempts == self._retry.limit:
                self.problem = f"the stream broke and {attempts} attempts to reconnect failed"
                return None
            self._retry.wait(attempts)
            attempts += 1
            bad_in_a_row = 0
            self._capture = self._connect()
            self.reconnects += self._capture.isOpened()

    def close(self) -> None:
        self._capture.release()


class SyntheticSource(FrameSource):
    """Moving synthetic scenes, a new one every five seconds; endless and the same on every run."""

    name = "synthetic"
    SCENE_S = 5.0
    OBJECTS = 6

    def __init__(self, image_size: tuple[int, int]) -> None:
        """Frames of (height, width) pixels."""
        self._image_size = image_size
        self._scene = SyntheticVideo(0, image_size, self.OBJECTS)
        self._frames = 0

    def read(self) -> Image:
        scene, step = divmod(self._frames, round(self.SCENE_S * self.fps))
        if step == 0 and scene:
            self._scene = SyntheticVideo(scene, self._image_size, self.OBJECTS)
        self._frames += 1
        return self._scene.frame(step / self.fps).image


def open_source(source: str, image_size: tuple[int, int] = (480, 640)) -> FrameSource:
    """Open what `--source` names: a camera's number or device, a stream's address, "synthetic" or a file.

    Args:
        source: "0", "/dev/video0", "rtsp://...", "synthetic" or a path.
        image_size: (height, width) of synthetic frames.

    Raises:
        UserError: it cannot be opened.
    """
    if source == "synthetic":
        return SyntheticSource(image_size)
    if source.isdecimal():
        return LiveSource(f"camera {source}", lambda: cv2.VideoCapture(int(source)))
    if Path(source).is_char_device():
        return LiveSource(source, lambda: cv2.VideoCapture(source, cv2.CAP_V4L2))
    if source.lower().startswith(NETWORK_SCHEMES):
        return LiveSource(source, lambda: cv2.VideoCapture(source))
    return FileSource.open(Path(source))

"""Where video frames come from: files, cameras, network streams, moving synthetic scenes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from norton_deploy.data.synthetic.scene import SyntheticVideo
from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Image
from norton_deploy.video.captures import CameraCapture, Capture, CorruptFrameError, StreamCapture

NETWORK_SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "http://", "https://", "udp://", "tcp://")
DEFAULT_FPS = 25.0
MAX_BAD_FRAMES_IN_A_ROW = 100


class FrameSource(ABC):
    """Frames one after another.

    Attributes:
        is_live: frames arrive by the clock whether they are wanted or not.
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


class FileSource(FrameSource):
    """A video file. A frame that cannot be decoded is counted and skipped.

    Frames that the file's header announces but that never come count as corrupt too; damage that the decoder conceals
    cannot be seen.
    """

    def __init__(self, name: str, capture: Capture) -> None:
        self.name = name
        self._capture = capture
        self.fps = plausible_fps(capture.fps)
        self._frames = 0

    @classmethod
    def open(cls, path: Path) -> FileSource:
        """Open a file.

        Raises:
            UserError: it is missing, or is no video that FFmpeg can read (a recording that was cut off
                before its index was written is such a case).
        """
        if not path.is_file():
            raise UserError(f"{path}: no such video file")
        return cls(str(path), StreamCapture(str(path)))

    def read(self) -> Image | None:
        for _ in range(MAX_BAD_FRAMES_IN_A_ROW):
            try:
                frame = self._capture.read()
            except CorruptFrameError:
                self.corrupt_frames += 1
                continue
            if frame is None:
                self.corrupt_frames = max(self.corrupt_frames, self._capture.announced - self._frames)
            self._frames += frame is not None
            return frame
        self.problem = f"{MAX_BAD_FRAMES_IN_A_ROW} frames in a row could not be decoded"
        return None

    def close(self) -> None:
        self._capture.close()


def plausible_fps(fps: float) -> float:
    """A frame rate as a source states it, or the default where it cannot be true."""
    return fps if 0 < fps < 1000 else DEFAULT_FPS


@dataclass
class RetryPolicy:
    """How a live source that broke is opened again.

    Attributes:
        limit: attempts in a row before giving up.
        first_delay_s: wait before the first attempt; doubles each time.
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

    def __init__(self, name: str, connect: Callable[[], Capture], retry: RetryPolicy | None = None) -> None:
        """Connect once.

        Args:
            name: what to call it in messages.
            retry: when and how often to reconnect.

        Raises:
            UserError: the first connection fails; a wrong address should not be retried.
        """
        self.name = name
        self._connect = connect
        self._retry = retry or RetryPolicy()
        self._capture: Capture | None = connect()
        self.fps = plausible_fps(self._capture.fps)

    def read(self) -> Image | None:
        bad_in_a_row = attempts = 0
        while True:
            try:
                frame = None if self._capture is None else self._capture.read()
                if frame is not None:
                    return frame
            except CorruptFrameError:
                self.corrupt_frames += 1
                bad_in_a_row += 1
                if bad_in_a_row < MAX_BAD_FRAMES_IN_A_ROW:
                    continue
            self.close()
            if attempts == self._retry.limit:
                self.problem = f"the stream broke and {attempts} attempts to reconnect failed"
                return None
            self._retry.wait(attempts)
            attempts += 1
            bad_in_a_row = 0
            with suppress(UserError):
                self._capture = self._connect()
                self.reconnects += 1

    def close(self) -> None:
        if self._capture is not None:
            self._capture.close()
        self._capture = None


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
        return LiveSource(f"camera {source}", lambda: CameraCapture(int(source)))
    if Path(source).is_char_device():
        return LiveSource(source, lambda: CameraCapture(source))
    if source.lower().startswith(NETWORK_SCHEMES):
        return LiveSource(source, lambda: StreamCapture(source, network=True))
    return FileSource.open(Path(source))

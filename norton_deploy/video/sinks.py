"""Where drawn frames go: an MP4 file, a window."""

from __future__ import annotations

import os
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import av
import cv2
import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError
from norton_deploy.files import give_usual_rights
from norton_deploy.inference.predictor import Image

CODECS: dict[str, dict[str, object]] = {"libx264": {"preset": "ultrafast"}, "mpeg4": {"qscale": "4"}}
"""H.264, which browsers play, where the build of FFmpeg has it; else MPEG-4 part 2."""
MOVFLAGS = "hybrid_fragmented"
"""Fragments while it is written, so that whatever ends the process leaves a video; one index at a proper end."""
KEYFRAME_S = 1.0
"""Seconds of a fragment, so of what a kill can cost beside the encoder's delay."""
WINDOW = "norton_deploy (q closes)"


class VideoFile:
    """An MP4 file that appears under its name when it is closed, after an exception or on a full disk too.

    Use as a context manager. Frames go to a hidden neighbour of an unpredictable name, opened exclusively; it is
    renamed on exit. After SIGKILL or a power cut the neighbour (`.NAME.XXXXXXXX.partial.mp4`) stays and plays to the
    last second but one; nothing removes it but its owner.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """Prepare to write; the file is opened with the first frame, whose size it takes.

        Raises:
            UserError: not an .mp4 name, or the folder cannot be written to.
        """
        if path.suffix.lower() != ".mp4":
            raise UserError(f"{path}: the output video must be called .mp4")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
            raise UserError(f"{path}: cannot write a video here; the folder must exist and be writable")
        self.path = path
        self.frames = 0
        self._fps = fps
        self._partial: Path | None = None
        self._frame_size = (0, 0)
        self._last: npt.NDArray[Any] = np.empty(0, np.uint8)

    def write(self, frame: Image, time_s: float | None = None) -> None:
        """Append a frame; one of another size is scaled to the first one's; odd sides are made even.

        Args:
            frame: uint8 RGB [H, W, 3].
            time_s: when it was seen, in seconds since the first frame, for a source that runs by the clock: the
                frame before is repeated until then, and a frame that comes before its turn is left out, so that
                the video plays as fast as things happened.

        Raises:
            UserError: the file cannot be opened or written to (a full disk); what came before stays.
        """
        if self._partial is None:
            self._open((frame.shape[1] // 2 * 2, frame.shape[0] // 2 * 2))
        if frame.shape[:2] != self._frame_size[::-1]:
            scaled = cv2.resize(frame, self._frame_size, interpolation=cv2.INTER_AREA)
            frame = np.asarray(scaled, np.uint8)
        turn = self.frames if time_s is None else round(time_s * self._fps)
        while self.frames < turn:
            self._append(self._last)
        if self.frames == turn:
            self._append(cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420))

    def _open(self, frame_size: tuple[int, int]) -> None:
        """Make the neighbour and its encoder for frames of (width, height) pixels."""
        try:
            descriptor, name = tempfile.mkstemp(f".partial{self.path.suffix}", f".{self.path.stem}.", self.path.parent)
            self._partial, self._stream = Path(name), os.fdopen(descriptor, "wb+", buffering=0)
            codec = next(name for name in CODECS if name in av.codecs_available)
            self._container = av.open(self._stream, "w", format="mp4", options={"movflags": MOVFLAGS})
            stream = self._container.add_stream(codec, Fraction(self._fps).limit_denominator(1001))
            self._video = video = cast(av.VideoStream, stream)
            video.width, video.height = self._frame_size = frame_size
            video.pix_fmt, video.gop_size = "yuv420p", max(1, round(KEYFRAME_S * self._fps))
            video.options = dict(CODECS[codec])
            # H.264: a frame is encoded while its successor is drawn
            video.codec_context.thread_type, video.codec_context.thread_count = "FRAME", 2
            video.codec_context.open()
        except OSError as error:
            size = "x".join(map(str, frame_size))
            raise UserError(f"{self.path}: cannot write a {size} video here ({error.strerror})") from error

    def _append(self, frame: npt.NDArray[Any]) -> None:
        """Write a frame of the video's size in planes of Y, U and V."""
        picture = av.VideoFrame.from_numpy_buffer(frame, format="yuv420p")
        picture.pts = self.frames
        try:
            self._container.mux(self._video.encode(picture))
        except OSError as error:
            raise UserError(self._broken_off(error)) from error
        self.frames += 1
        self._last = frame

    def _broken_off(self, error: Exception) -> str:
        reason = getattr(error, "strerror", error)
        return f"{self.path}: cannot be written any further ({reason}); what was recorded until then is in it"

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._partial is None:
            return
        problem: Exception | None = None
        try:
            with self._stream:
                self._container.mux(self._video.encode(None))
                self._container.close()
                os.fsync(self._stream.fileno())
        except (OSError, av.FFmpegError) as failure:  # the second after a failed write is FFmpeg's
            problem = failure
        if self.frames:
            give_usual_rights(self._partial)
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)
        if problem is not None and error is None:
            raise UserError(self._broken_off(problem))


class Window:
    """A window on the desktop."""

    def __init__(self) -> None:
        """Check that there is a desktop.

        Raises:
            UserError: there is none (OpenCV would abort the whole process).
        """
        has_display = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
        if sys.platform.startswith("linux") and not has_display:
            raise UserError("--show: no display on this machine (DISPLAY is not set); leave --show out")

    def show(self, frame: Image) -> bool:
        """Show a frame, uint8 RGB; False when the user asks to stop (q or Escape)."""
        cv2.imshow(WINDOW, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        return cv2.waitKey(1) & 0xFF not in (ord("q"), 27)

    def close(self) -> None:
        """Close the window."""
        cv2.destroyAllWindows()

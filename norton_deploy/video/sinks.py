"""Where drawn frames go: an MP4 file, a window."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Image

CODEC = "mp4v"
WINDOW = "norton_deploy (q closes)"


class VideoFile:
    """An MP4 file that appears under its name only when it was closed properly.

    Use as a context manager; frames go to a hidden neighbour, which is renamed on exit, after an exception
    too: what was recorded so far is a readable video. What cannot be read back (a full disk: OpenCV does not tell)
    is left beside, and an older video of that name stays.
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
        self._partial = path.with_name(f".{path.stem}.partial.mp4")
        self._writer: cv2.VideoWriter | None = None
        self._frame_size = (0, 0)
        self._last: npt.NDArray[Any] = np.empty(0, np.uint8)

    def write(self, frame: Image, time_s: float | None = None) -> None:
        """Append a frame; one of another size is scaled to the first one's.

        Args:
            frame: uint8 RGB [H, W, 3].
            time_s: when it was seen, in seconds since the first frame, for a source that runs by the clock: the
                frame before is repeated until then, and a frame that comes before its turn is left out, so that
                the video plays as fast as things happened.

        Raises:
            UserError: OpenCV cannot open the file for writing.
        """
        if self._writer is None:
            self._frame_size = (frame.shape[1], frame.shape[0])
            fourcc = cv2.VideoWriter.fourcc(*CODEC)
            self._writer = cv2.VideoWriter(str(self._partial), fourcc, self._fps, self._frame_size)
            if not self._writer.isOpened():
                raise UserError(f"{self.path}: OpenCV cannot write {CODEC} video here ({self._frame_size})")
        if (frame.shape[1], frame.shape[0]) != self._frame_size:
            frame = cv2.resize(frame, self._frame_size, interpolation=cv2.INTER_AREA).astype(frame.dtype)
        turn = self.frames if time_s is None else round(time_s * self._fps)
        while self.frames < turn:
            self._append(self._last)
        if self.frames == turn:
            self._append(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def _append(self, frame: npt.NDArray[Any]) -> None:
        """Write a BGR frame of the video's size."""
        assert self._writer is not None
        self._writer.write(frame)
        self.frames += 1
        self._last = frame

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()
        if not self.frames:
            self._partial.unlink(missing_ok=True)
        elif self._readable_frames() == self.frames:
            self._partial.replace(self.path)
        else:
            raise UserError(
                f"{self.path}: the video cannot be read back (is the disk full?); what was written is {self._partial}"
            )

    def _readable_frames(self) -> int:
        """Frames that the closed file announces, 0 if it cannot be opened."""
        capture = cv2.VideoCapture(str(self._partial))
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        return frames


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

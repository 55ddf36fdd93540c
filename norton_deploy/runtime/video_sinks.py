"""Where drawn frames go: an MP4 file, a window."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

import cv2

from norton_deploy.errors import UserError
from norton_deploy.runtime.predictor import Image

CODEC = "mp4v"
WINDOW = "norton_deploy (q closes)"


class VideoFile:
    """An MP4 file that appears under its name only when it was closed properly.

    Use as a context manager; frames go to a hidden neighbour, which is renamed on exit, after an exception
    too: what was recorded so far is a readable video.
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

    def write(self, frame: Image) -> None:
        """Append a frame, uint8 RGB [H, W, 3]; one of another size is scaled to the first one's.

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
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.frames += 1

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()
        if self.frames:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)


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

"""What opens a video and decodes it: PyAV for files and streams, OpenCV for cameras."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import av
import cv2
import numpy as np

from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Image

OPEN_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 10.0
"""After so long without a byte a stream counts as broken."""
STREAM_OPTIONS = {"rtsp_transport": "tcp"}
"""Over UDP a lost packet would be a damaged picture."""

FILE_OPTIONS = {"protocol_whitelist": "file"}
"""A playlist that calls itself a video fetches nothing from a network."""


class CorruptFrameError(Exception):
    """A frame was there and could not be decoded; the next call may give one."""


class Capture(Protocol):
    """An open camera, file or stream.

    Attributes:
        fps: its nominal frame rate; 0 when it does not say.
        announced: frames that its header promises, 0 when it does not say.
    """

    fps: float
    announced: int

    def read(self) -> Image | None:
        """The next frame, uint8 RGB [H, W, 3], or None at the end, or once the source is broken.

        Raises:
            CorruptFrameError: this frame cannot be decoded.
        """

    def close(self) -> None:
        """Release the device, file or connection."""


class CameraCapture:
    """A camera through OpenCV."""

    announced = 0

    def __init__(self, camera: int | str) -> None:
        """Open it by number or device.

        Raises:
            UserError: it is not there, or something else has it.
        """
        self._capture = cv2.VideoCapture(camera) if isinstance(camera, int) else cv2.VideoCapture(camera, cv2.CAP_V4L2)
        if not self._capture.isOpened():
            name = f"camera {camera}" if isinstance(camera, int) else camera
            raise UserError(f"{name}: cannot open this camera; is it there and free?")
        self.fps = self._capture.get(cv2.CAP_PROP_FPS)

    def read(self) -> Image | None:
        """See `Capture.read`."""
        if not self._capture.grab():
            return None
        decoded, frame = self._capture.retrieve()
        if not decoded or frame is None or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise CorruptFrameError
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)

    def close(self) -> None:
        """See `Capture.close`."""
        self._capture.release()


class StreamCapture:
    """A file or a network stream through PyAV, turned upright as its metadata says."""

    def __init__(self, address: str, *, network: bool = False) -> None:
        """Open a path, or with `network` an address that FFmpeg knows (rtsp://, http://, ...).

        Raises:
            UserError: it is not there or no video that FFmpeg can read.
        """
        try:
            if network:
                timeout = (OPEN_TIMEOUT_S, READ_TIMEOUT_S)
                options = STREAM_OPTIONS if address.lower().startswith("rtsp") else {}
                self._container = av.open(address, options=options, timeout=timeout)
            else:
                self._container = av.open(f"file:{address}", options=FILE_OPTIONS)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{address}: FFmpeg cannot read a video here ({_reason(error)})") from error
        if not self._container.streams.video:
            self._container.close()
            raise UserError(f"{address}: there is no video in it")
        self._video = self._container.streams.video[0]
        self._video.thread_type = "AUTO"
        self.fps = float(self._video.average_rate or self._video.guessed_rate or 0)
        self.announced = self._video.frames
        self._packets = self._container.demux(self._video)
        self._decoded: Iterator[av.VideoFrame] = iter(())

    def read(self) -> Image | None:
        """See `Capture.read`."""
        while True:
            frame = next(self._decoded, None)
            if frame is not None:
                return upright(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8), frame.rotation)
            try:
                packet = next(self._packets, None)
            except (av.FFmpegError, OSError, ValueError):  # the rest cannot be reached
                return None
            if packet is None:
                return None
            try:
                self._decoded = iter(packet.decode())
            except av.EOFError:
                return None
            except (av.FFmpegError, ValueError) as error:
                raise CorruptFrameError from error

    def close(self) -> None:
        """See `Capture.close`."""
        self._container.close()


def upright(image: Image, rotation: int) -> Image:
    """Turn a decoded frame by `rotation` degrees anticlockwise, a multiple of 90 (as phones record them)."""
    return np.ascontiguousarray(np.rot90(image, round(rotation / 90)))


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]

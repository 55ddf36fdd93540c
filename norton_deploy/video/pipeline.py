"""Detection on video: capture, inference and drawing run at the same time, joined by bounded queues."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np

from norton_deploy.inference.drawing import compose_panels
from norton_deploy.inference.predictor import Image, Predictor
from norton_deploy.structures import Detections
from norton_deploy.video.frame_queue import FrameQueue
from norton_deploy.video.sinks import VideoFile, Window
from norton_deploy.video.sources import FrameSource

QUEUE_CAPACITY = 2
OVERLAY_WINDOW = 60
MEASURED_FRAMES = 10_000
WARM_UP_SIZE = (480, 640)
STALL_S = 1.0
"""How long the end of a run waits for a source that is still reading."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a service manager's stop and a closed terminal."""


@dataclass
class _Frame:
    """A frame, the moment it was captured (`time.perf_counter` seconds), each model's detections and time.

    A file has no such moment: its frames count from when inference takes them up, since how long they lay
    read ahead says nothing.
    """

    image: Image
    captured_s: float
    detections: list[Detections] = field(default_factory=list)
    predict_ms: list[float] = field(default_factory=list)


@dataclass
class _Run:
    """What is measured while the pipeline runs: counts of all frames, times of the last `MEASURED_FRAMES` written ones,
    so that a camera may run for years."""

    written_s: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED_FRAMES))
    latency_ms: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED_FRAMES))
    predict_ms: deque[list[float]] = field(default_factory=lambda: deque(maxlen=MEASURED_FRAMES))
    captured: int = 0
    written: int = 0
    errors: list[BaseException] = field(default_factory=list)


class VideoPipeline:
    """Runs one model, or two side by side, over a source and writes what they see.

    Live sources drop the oldest waiting frame when inference is slower than the camera, and count it (the recording
    repeats the frame before, so that it plays in real time); files and synthetic scenes wait. With two models both see
    every frame, in alternating order.
    """

    def __init__(
        self,
        source: FrameSource,
        models: Sequence[tuple[str, Predictor]],
        output: VideoFile,
        *,
        window: Window | None = None,
        score_threshold: float = 0.5,
        max_frames: int | None = None,
    ) -> None:
        """Connect the parts; nothing runs yet.

        Args:
            source: where frames come from; closed by the thread that reads it.
            models: (label, predictor) of the panels, left to right.
            output: an entered `VideoFile`.
            window: shows the same frames on the desktop.
            score_threshold: detections below it are not drawn.
            max_frames: stop after writing this many frames.
        """
        self._source = source
        self._models = list(models)
        self._output = output
        self._window = window
        self._score_threshold = score_threshold
        self._max_frames = max_frames
        self._stop = threading.Event()
        self._captured = FrameQueue[_Frame](QUEUE_CAPACITY, self._stop, drop_oldest=source.is_live)
        self._analysed = FrameQueue[_Frame](QUEUE_CAPACITY, self._stop, drop_oldest=False)
        self._measured = _Run()
        self._ended = "end of the source"

    def interrupt(self) -> None:
        """Ask `run` to finish after the current frame; safe in a signal handler."""
        self._ended = "interrupted"
        self._stop.set()

    def run_until_stopped(self) -> dict[str, Any]:
        """`run`, which any of `STOP_SIGNALS` ends after the current frame and a second Ctrl-C at once."""

        def on_signal(_signal: int, _frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.interrupt()

        previous = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
        try:
            return self.run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self) -> dict[str, Any]:
        """Process the source to its end and return the summary that `summary` describes.

        Drawing and the window stay in the calling thread, as desktop toolkits demand.

        Raises:
            UserError, or whatever a stage raised, after the threads have ended.
        """
        for _, predictor in self._models:  # the first call of an engine or of cuDNN is not typical
            predictor([np.zeros((*(predictor.input_size or WARM_UP_SIZE), 3), np.uint8)])
        stages = (self._capture, self._infer)
        capture, infer = (threading.Thread(target=self._guard, args=(stage,), daemon=True) for stage in stages)
        capture.start()
        infer.start()
        try:
            self._draw()
        finally:
            self._stop.set()
            infer.join()
            capture.join(STALL_S)  # a camera or stream that hangs holds it much longer; it ends with its read
            if self._window is not None:
                self._window.close()
        if self._measured.errors:
            raise self._measured.errors[0]
        return self.summary()

    def _guard(self, stage: Callable[[], None]) -> None:
        """Run a stage in its thread; an exception ends the pipeline and is raised again by `run`."""
        try:
            stage()
        except BaseException as error:  # must reach the main thread, whatever it is
            self._measured.errors.append(error)
            self._stop.set()

    def _capture(self) -> None:
        try:
            while not self._stop.is_set():
                image = self._source.read()
                if image is None:
                    break
                self._measured.captured += 1
                self._captured.put(_Frame(image, time.perf_counter()))
            self._captured.close()
        finally:
            self._source.close()  # here, where nothing reads it any more

    def _infer(self) -> None:
        order = list(range(len(self._models)))
        while (frame := self._captured.get()) is not None:
            if not self._source.is_live:
                frame.captured_s = time.perf_counter()
            detections: dict[int, Detections] = {}
            predict_ms = [0.0] * len(order)
            for index in order:
                started = time.perf_counter()
                detections[index] = self._models[index][1]([frame.image])[0]
                predict_ms[index] = (time.perf_counter() - started) * 1e3
            order.reverse()  # neither model is always the one with the warmer caches
            frame.detections, frame.predict_ms = [detections[i] for i in range(len(order))], predict_ms
            self._analysed.put(frame)
        self._analysed.close()

    def _draw(self) -> None:
        measured = self._measured
        recent_predict_ms: deque[list[float]] = deque(maxlen=OVERLAY_WINDOW)
        recent_latency_ms: deque[float] = deque(maxlen=OVERLAY_WINDOW)
        recent_written_s: deque[float] = deque(maxlen=OVERLAY_WINDOW)
        first_s: float | None = None
        while (frame := self._analysed.get()) is not None:
            recent_predict_ms.append(frame.predict_ms)
            # a slice: scores descend, and masks that are not drawn are never copied
            shown = [found[: np.count_nonzero(found.scores >= self._score_threshold)] for found in frame.detections]
            mean_ms = np.mean(recent_predict_ms, axis=0)
            headings = [f"{label}: {1e3 / ms:.1f} FPS" for (label, _), ms in zip(self._models, mean_ms, strict=True)]
            categories = [predictor.categories for _, predictor in self._models]
            fps = _rate(recent_written_s)
            canvas = compose_panels(frame.image, shown, categories, headings, fps, list(recent_latency_ms))
            first_s = frame.captured_s if first_s is None else first_s
            self._output.write(canvas, frame.captured_s - first_s if self._source.is_live else None)
            open_window = self._window is None or self._window.show(canvas)
            now = time.perf_counter()
            latency_ms = (now - frame.captured_s) * 1e3
            for times in (measured.written_s, recent_written_s):
                times.append(now)
            for times in (measured.latency_ms, recent_latency_ms):
                times.append(latency_ms)
            measured.written += 1
            measured.predict_ms.append(frame.predict_ms)
            if not open_window:
                self._ended = "window closed"
                return
            if self._max_frames is not None and measured.written >= self._max_frames:
                self._ended = "frame limit"
                return

    def summary(self) -> dict[str, Any]:
        """The measured figures, JSON-ready.

        `pipeline.capture_to_display_ms` runs from the captured frame (for files: from when inference takes it
        up) to the drawn and written one, with two models both of them included; `models[].fps` is what each
        model alone allows. Times are of the last `MEASURED_FRAMES` frames.
        """
        measured, source = self._measured, self._source
        predict_ms = np.asarray(measured.predict_ms, float).reshape(-1, len(self._models))
        return {
            "source": source.name,
            "live": source.is_live,
            "ended": source.problem or self._ended,
            "frames": {
                "captured": measured.captured,
                "written": measured.written,
                "dropped": self._captured.dropped,
                "corrupt": source.corrupt_frames,
            },
            "reconnects": source.reconnects,
            "pipeline": {
                "fps": _rate(measured.written_s),
                "capture_to_display_ms": _percentiles(measured.latency_ms),
            },
            "models": [
                {
                    "label": label,
                    "file": predictor.name,
                    "backend": predictor.backend,
                    "device": predictor.device,
                    "fps": 1e3 / float(predict_ms[:, index].mean()) if len(predict_ms) else None,
                    "predict_ms": _percentiles(predict_ms[:, index].tolist()),
                }
                for index, (label, predictor) in enumerate(self._models)
            ],
        }


def _rate(times_s: Sequence[float] | deque[float]) -> float | None:
    """Events per second over a list of moments, None for fewer than two."""
    return (len(times_s) - 1) / (times_s[-1] - times_s[0]) if len(times_s) > 1 else None


def _percentiles(values: Sequence[float] | deque[float]) -> dict[str, float] | None:
    """{"p50", "p95"} of the values, None for none."""
    if not values:
        return None
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": float(p50), "p95": float(p95)}

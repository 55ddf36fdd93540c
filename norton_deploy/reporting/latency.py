"""Latency of detectors side by side: a call is an image from file to detections, and its stages are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from norton_deploy.cost.turns import TimeSummary, Turns, time_in_turns
from norton_deploy.data.image_file import read_image
from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Predictor

STREAM_FRAMES, STREAM_ROUNDS = 4, 3


@dataclass(frozen=True)
class LatencySummary(TimeSummary):
    """Statistics of one detector's calls.

    Attributes:
        fps: 1000 / p50_ms, images per second of one-image calls.
        stages_ms: mean of each stage of `StageTiming`.
        detections: mean number of detections per image.
        throughput_fps: images per second of a stream (`Predictor.stream`), where one image's work overlaps the next's;
            `fps` where a predictor overlaps nothing, None in older results.
    """

    fps: float
    stages_ms: dict[str, float]
    detections: float
    throughput_fps: float | None = None


@dataclass(frozen=True)
class LatencyRun(Turns):
    """Calls of several detectors in turn, call k of every detector on the same image, decoding included.

    Attributes:
        stages_ms: per detector, one `StageTiming` as a dict per call.
        detections: int [rounds, detectors].
        streams: streams of `STREAM_FRAMES` images each, in turn, of the detectors that overlap them.
    """

    stages_ms: tuple[tuple[dict[str, float], ...], ...]
    detections: npt.NDArray[np.int64]
    streams: Turns | None

    def summary(self, name: str) -> LatencySummary:
        """Statistics of one detector."""
        index = self.names.index(name)
        times, stages = super().summary(name), self.stages_ms[index]
        fps = throughput = 1e3 / times.p50_ms
        if self.streams is not None and name in self.streams.names:
            throughput = 1e3 * STREAM_FRAMES / self.streams.summary(name).p50_ms
        return LatencySummary(
            **vars(times),
            fps=fps,
            throughput_fps=throughput,
            stages_ms={stage: float(np.mean([call[stage] for call in stages])) for stage in stages[0]},
            detections=float(self.detections[:, index].mean()),
        )


def measure_alternating(
    predictors: Mapping[str, Predictor],
    images: Sequence[Path],
    *,
    rounds: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyRun:
    """Time several detectors in turn (`time_in_turns`), one image per call.

    A predictor synchronises its device before it returns. Afterwards a few streams are timed, for the throughput.

    Args:
        images: image files, used in turn; decoding them is part of the time.

    Raises:
        UserError: no detectors, images or rounds, or an image that cannot be decoded.
    """
    if not images:
        raise UserError("latency: at least one image is needed")
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in predictors}
    detections: dict[str, list[int]] = {name: [] for name in predictors}

    def call_of(name: str, predictor: Predictor) -> Callable[[int], None]:
        def call(step: int) -> None:
            [(_, found)] = predictor.predict_files([images[step % len(images)]])
            if step >= 0:
                stages[name].append(dict(vars(predictor.timing)))
                detections[name].append(len(found))

        return call

    calls = {name: call_of(name, predictor) for name, predictor in predictors.items()}
    turns = time_in_turns(calls, rounds=rounds, warm_up=warm_up, clock=clock)
    counts = np.array(list(detections.values())).T
    frames = list(islice(cycle(images), STREAM_FRAMES))
    streamed = {
        name: partial(_stream, predictor, frames) for name, predictor in predictors.items() if predictor.overlaps
    }
    streams = time_in_turns(streamed, rounds=STREAM_ROUNDS, warm_up=0, clock=clock) if streamed else None
    return LatencyRun(turns.names, turns.times_ms, tuple(map(tuple, stages.values())), counts, streams)


def _stream(predictor: Predictor, files: Sequence[Path], _step: int) -> None:
    """All files through a predictor, decoding included."""
    for _ in predictor.stream(map(read_image, files)):
        pass

"""Latency of models side by side: alternating measurement, paired ratios, a verdict that can be "no"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Predictor

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 0.95
FEWEST_PAIRS = 6


@dataclass(frozen=True)
class LatencySummary:
    """Statistics of one model's calls, in milliseconds.

    Attributes:
        samples: number of calls.
        mean_ms, p50_ms, p90_ms, p99_ms: mean and percentiles.
        spread: interquartile range over median; large when the machine was busy.
        fps: 1000 / p50_ms, images per second of one-image calls.
        stages_ms: mean of each stage of `StageTiming`.
        detections: mean number of detections per image.
    """

    samples: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    spread: float
    fps: float
    stages_ms: dict[str, float]
    detections: float


@dataclass(frozen=True)
class Speedup:
    """How much faster a candidate is than a baseline, from paired calls on the same image.

    Attributes:
        ratio: median of baseline_ms / candidate_ms over the pairs.
        low, high: 95 % bootstrap interval of that median.
        pairs: number of pairs.
    """

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """One line; it claims a speed-up only when the interval lies above 1."""
        interval = f"{self.ratio:.2f}x, 95 % interval {self.low:.2f} to {self.high:.2f}, {self.pairs} pairs"
        if self.pairs < FEWEST_PAIRS:
            return f"no speed-up shown: {self.pairs} pairs are too few to tell ({self.ratio:.2f}x)"
        if self.low > 1:
            return f"speed-up {interval}"
        if self.high < 1:
            return f"no speed-up, it is slower: {interval}"
        return f"no speed-up: the interval includes 1 ({interval})"


@dataclass(frozen=True)
class AlternatingRun:
    """Calls of several models in turn, call k of every model on the same image.

    Attributes:
        names: of the models.
        total_ms: float64 [calls, models], decoding included.
        stages_ms: per model, one `StageTiming` as a dict per call.
        detections: int [calls, models].
    """

    names: tuple[str, ...]
    total_ms: np.ndarray
    stages_ms: tuple[tuple[dict[str, float], ...], ...]
    detections: np.ndarray

    def summary(self, name: str) -> LatencySummary:
        """Statistics of one model."""
        index = self.names.index(name)
        total_ms = self.total_ms[:, index]
        p25, p50, p75, p90, p99 = (float(value) for value in np.percentile(total_ms, [25, 50, 75, 90, 99]))
        stages = self.stages_ms[index]
        return LatencySummary(
            samples=len(total_ms),
            mean_ms=float(total_ms.mean()),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            spread=(p75 - p25) / p50,
            fps=1e3 / p50,
            stages_ms={stage: float(np.mean([call[stage] for call in stages])) for stage in stages[0]},
            detections=float(self.detections[:, index].mean()),
        )

    def speedup(self, baseline: str, candidate: str) -> Speedup:
        """Paired comparison of two of the models."""
        return paired_speedup(
            self.total_ms[:, self.names.index(baseline)], self.total_ms[:, self.names.index(candidate)]
        )


def measure_alternating(
    predictors: dict[str, Predictor], images: Sequence[Path], *, rounds: int, warm_up: int = 2
) -> AlternatingRun:
    """Time several models in one process, one image per call.

    Every round calls every model once on the same image file, so that slow drifts of the machine hit all
    alike, in the order that `balanced_orders` gives: what ran just before leaves its traces in caches and
    thread pools, and must not be the same model each time. A predictor synchronises its device before it
    returns.

    Args:
        predictors: name -> model.
        images: image files, used in turn; decoding them is part of the time.
        rounds: measured calls per model.
        warm_up: calls per model before measuring.

    Raises:
        UserError: no models, images or rounds, or an image that cannot be decoded.
    """
    if not predictors or not images or rounds < 1:
        raise UserError("latency: at least one model, one image and one round are needed")
    names = tuple(predictors)
    total_ms = np.zeros((rounds, len(names)))
    detections = np.zeros((rounds, len(names)), int)
    stages: list[list[dict[str, float]]] = [[] for _ in names]
    orders = balanced_orders(len(names))
    for step in range(-warm_up, rounds):
        image = images[step % len(images)]
        for index in orders[step % len(orders)]:
            predictor = predictors[names[index]]
            [(_, found)] = predictor.predict_files([image])
            if step < 0:
                continue
            total_ms[step, index] = predictor.timing.total_ms
            detections[step, index] = len(found)
            stages[index].append(dict(vars(predictor.timing)))
    return AlternatingRun(names, total_ms, tuple(tuple(calls) for calls in stages), detections)


def balanced_orders(count: int) -> list[list[int]]:
    """Williams' design: orders of 0..count-1 in which every one follows every other equally often.

    Returns:
        `count` orders, twice as many for an odd count (each then also reversed).
    """
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]
    orders = [[(index + shift) % count for index in zigzag] for shift in range(count)]
    return orders + [order[::-1] for order in orders] if count % 2 else orders


def paired_speedup(baseline_ms: npt.ArrayLike, candidate_ms: npt.ArrayLike, *, seed: int = 0) -> Speedup:
    """Median of the paired ratios baseline / candidate with its percentile-bootstrap interval.

    Args:
        baseline_ms: times of the baseline, call by call.
        candidate_ms: times of the candidate for the same calls.
        seed: of the resampling.
    """
    ratios = np.asarray(baseline_ms, float) / np.asarray(candidate_ms, float)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(ratios), (BOOTSTRAP_SAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Speedup(float(np.median(ratios)), float(low), float(high), len(ratios))


def macs_ceiling(baseline_stages_ms: dict[str, float], macs_ratio: dict[str, float]) -> float:
    """Amdahl's bound: the speed-up if every stage's time shrank exactly as its MACs do.

    Stages without MACs (decoding, copies, box selection) keep their time; what is beyond this figure comes
    from elsewhere than the saved arithmetic (a better kernel form, another engine).

    Args:
        baseline_stages_ms: stage -> time of the baseline.
        macs_ratio: stage -> candidate MACs / baseline MACs, for the stages that have MACs.

    Raises:
        UserError: a ratio for a stage that was not measured.
    """
    unknown = macs_ratio.keys() - baseline_stages_ms.keys()
    if unknown:
        raise UserError(f"Amdahl's bound: no measured time for the stages {', '.join(sorted(unknown))}")
    shrunk_ms = sum(time_ms * macs_ratio.get(stage, 1.0) for stage, time_ms in baseline_stages_ms.items())
    return sum(baseline_stages_ms.values()) / shrunk_ms


def summary_to_dict(summary: LatencySummary | Speedup) -> dict[str, Any]:
    """JSON form; a `Speedup` also tells its verdict."""
    fields = dict(vars(summary))
    return fields | {"verdict": summary.verdict} if isinstance(summary, Speedup) else fields

"""The timer: calls that take turns in balanced orders, their statistics, and paired ratios with a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 0.95
FEWEST_PAIRS = 6


@dataclass(frozen=True)
class TimeSummary:
    """Statistics of one call's times, in milliseconds.

    Attributes:
        samples: number of rounds.
        mean_ms, p50_ms, p90_ms, p99_ms: mean and percentiles.
        spread: interquartile range over median; large when the machine was busy.
    """

    samples: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    spread: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dict(vars(self))


@dataclass(frozen=True)
class Speedup:
    """How much faster a candidate is than a baseline, from pairs of the same round.

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

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the verdict included."""
        return {**vars(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Turns:
    """Times of several calls that took turns, round by round.

    Attributes:
        names: of the calls.
        times_ms: float64 [rounds, calls].
    """

    names: tuple[str, ...]
    times_ms: npt.NDArray[np.float64]

    def of(self, name: str) -> npt.NDArray[np.float64]:
        """Times of one call in ms, [rounds]."""
        return self.times_ms[:, self.names.index(name)]

    def summary(self, name: str) -> TimeSummary:
        """Statistics of one call."""
        times_ms = self.of(name)
        p25, p50, p75, p90, p99 = (float(value) for value in np.percentile(times_ms, [25, 50, 75, 90, 99]))
        return TimeSummary(len(times_ms), float(times_ms.mean()), p50, p90, p99, spread=(p75 - p25) / p50)

    def speedup(self, baseline: str, candidate: str) -> Speedup:
        """Paired comparison of two of the calls."""
        return paired_speedup(self.of(baseline), self.of(candidate))

    def to_dict(self) -> dict[str, list[float]]:
        """Name -> its times in ms."""
        return {name: self.of(name).tolist() for name in self.names}


def time_in_turns(
    calls: Mapping[str, Callable[[int], Any]],
    *,
    rounds: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    enough: Callable[[], bool] = lambda: False,
) -> Turns:
    """Time calls that take turns in one process.

    Every round makes every call once, so that slow drifts of the machine hit all alike, in the order that
    `balanced_orders` gives: what ran just before leaves its traces in caches and thread pools, and must not be the
    same call each time.

    Args:
        calls: name -> call. It gets the number of the round, below zero while warming up; it must not return
            before its device is done.
        rounds: timed calls of each.
        warm_up: rounds before that, not timed.
        clock: of seconds.
        enough: asked before every round from the third on; when it says so, the rounds so far are all.

    Raises:
        UserError: no calls or no rounds.
    """
    if not calls or rounds < 1:
        raise UserError("timing: at least one call and one round are needed")
    names = tuple(calls)
    times_ms = np.zeros((rounds, len(names)))
    orders = balanced_orders(len(names))
    for step in range(-warm_up, rounds):
        if step > 1 and enough():
            return Turns(names, times_ms[:step])
        for index in orders[step % len(orders)]:
            started = clock()
            calls[names[index]](step)
            if step >= 0:
                times_ms[step, index] = (clock() - started) * 1e3
    return Turns(names, times_ms)


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
        baseline_ms: times of the baseline, round by round.
        candidate_ms: times of the candidate in the same rounds.
        seed: of the resampling.
    """
    ratios = np.asarray(baseline_ms, float) / np.asarray(candidate_ms, float)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(ratios), (BOOTSTRAP_SAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Speedup(float(np.median(ratios)), float(low), float(high), len(ratios))

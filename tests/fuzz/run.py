"""The long fuzz (`make fuzz`): thousands of inputs in processes of their own, which may crash, hang or grow.

Inputs are made from seeds 0, 1, 2 ... of each kind. A worker says which seed comes next before it reads it; where it
dies, is silent for longer than a case may take, or takes more memory than it may, the seed is a failure and another
worker goes on behind it.
"""

from __future__ import annotations

import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.lib.cells import RESULTS, ResultCells, run, settings_of, tabulate

SLOWEST_S = 5.0
LARGEST_BYTES = 2 * 10**9
START_S = 300.0
POLL_S = 0.05
WEIGHTS = {"coco": 4, "picture": 4, "graph": 2, "checkpoint": 1, "state_dict": 1, "names": 1, "settings": 1}
"""Shares of the cases; every other kind has two."""


@dataclass
class Settings:
    """Settings of the long fuzz."""

    out: Path = RESULTS / "fuzz.json"
    """Results file; a Markdown table is written beside it. Kinds that are there already are not run again."""
    cases: int = 10_000
    """Inputs of all kinds together."""
    first_seed: int = 0
    """Seed of the first input of each kind."""
    worker: str = ""
    """For the runner itself: KIND FIRST LAST."""


@dataclass
class Outcome:
    """Attributes: how many inputs of a kind were accepted and refused, the slowest, and what failed, by seed."""

    accepted: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)


def work(kind: str, first: int, last: int) -> None:
    """Read the inputs of some seeds, and print a line before and after each."""
    from tests.fuzz.inputs import MAKERS
    from tests.fuzz.readers import try_input

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, last):
            content = MAKERS[kind](random.Random(seed))
            print(f"start {seed}", flush=True)
            try:
                result = "accepted" if try_input(kind, content, Path(folder)) else "refused"
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:300].replace(folder, "FOLDER")
                result = f"{type(error).__name__} in {Path(at.filename).name}, {at.name}: {text}"
            print(f"end {result}", flush=True)


def lines_of(worker: subprocess.Popen[str]) -> Iterator[str | None]:
    """The worker's lines as they come, None every `POLL_S` without one; ends with the worker."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def collect() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line.rstrip("\n"))
        lines.put("")

    threading.Thread(target=collect, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=POLL_S)
        except queue.Empty:
            yield None
        else:
            if not line:
                return
            yield line


def watch(kind: str, first: int, last: int, outcome: Outcome) -> int:
    """Run one worker to its end or its death; returns the seed to go on with."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--worker", f"{kind} {first} {last}"]
    seed, started, reading = first, time.monotonic(), False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1) as worker:
        process = psutil.Process(worker.pid)
        for line in lines_of(worker):
            taken = time.monotonic() - started
            reason = ""
            try:
                if process.memory_info().rss > LARGEST_BYTES:
                    reason = f"took more than {LARGEST_BYTES / 1e9:g} GB"
            except psutil.NoSuchProcess:
                pass
            if taken > (SLOWEST_S if reading else START_S):
                reason = f"took longer than {SLOWEST_S:g} s"
            if reason:
                outcome.failures[seed] = reason
                worker.kill()
                return seed + 1
            if line is None:
                continue
            event, _, rest = line.partition(" ")
            if event == "start":
                seed, started, reading = int(rest), time.monotonic(), True
            elif event == "end":
                outcome.slowest_s, reading = max(outcome.slowest_s, taken), False
                started = time.monotonic()
                if rest in ("accepted", "refused"):
                    setattr(outcome, rest, getattr(outcome, rest) + 1)
                else:
                    outcome.failures[seed] = rest
    if worker.returncode:
        outcome.failures[seed] = f"the process died with status {worker.returncode}"
        return seed + 1
    return last


def shares(cases: int) -> dict[str, int]:
    """How many inputs of each kind."""
    from tests.fuzz.inputs import MAKERS

    weights = {kind: WEIGHTS.get(kind, 2) for kind in MAKERS}
    counts = {kind: cases * weight // sum(weights.values()) for kind, weight in weights.items()}
    counts["coco"] += cases - sum(counts.values())
    return counts


def main(settings: Settings) -> int:
    """Run; returns 1 if an input broke the promise."""
    if settings.worker:
        kind, first, last = settings.worker.split()
        work(kind, int(first), int(last))
        return 0
    limits = {"slowest_s": SLOWEST_S, "largest_bytes": LARGEST_BYTES}
    results = ResultCells(settings.out, settings_of(settings, "worker") | limits, report)
    return results.measure_all(
        {kind: partial(attack, kind, settings.first_seed, count) for kind, count in shares(settings.cases).items()}
    )


def attack(kind: str, first: int, count: int) -> dict[str, Any]:
    """All inputs of a kind."""
    outcome, seed, last = Outcome(), first, first + count
    while seed < last:
        seed = watch(kind, seed, last, outcome)
    found = {"cases": count, "accepted": outcome.accepted, "refused": outcome.refused}
    found["slowest_s"] = round(outcome.slowest_s, 2)
    failures = "; ".join(f"seed {number}: {reason}" for number, reason in outcome.failures.items())
    return found | {"failure": failures} if failures else found


def report(results: ResultCells) -> str:
    """A row for each kind, and all together."""
    counted = ("cases", "accepted", "refused")
    total = {name: sum(cell[name] for cell in results.cells.values()) for name in counted}
    total["slowest_s"] = max((cell["slowest_s"] for cell in results.cells.values()), default=0.0)
    return tabulate(
        "Damaged and malicious inputs: taken with a correct result, or refused in one line; failures are crashes, "
        f"tracebacks, wrong results, more than {SLOWEST_S:g} s or {LARGEST_BYTES / 1e9:g} GB",
        [*results.cells.items(), ("all", total)],
        {
            "Kind": lambda row: row[0],
            "Inputs": lambda row: str(row[1]["cases"]),
            "Accepted": lambda row: str(row[1]["accepted"]),
            "Refused": lambda row: str(row[1]["refused"]),
            "Slowest, s": lambda row: f"{row[1]['slowest_s']:.2f}",
            "Failures": lambda row: row[1].get("failure", "none"),
        },
    ).to_markdown()


if __name__ == "__main__":
    run(Settings, main)

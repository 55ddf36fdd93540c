"""Which exact form each CPDBlock runs fastest in, on the engine that will run it: measured, not assumed."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from norton_deploy.compression.lowering import Form
from norton_deploy.cost.layer_calls import LayerCall
from norton_deploy.cost.layer_graphs import LayerShape, layer_graph
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write

FORMS: tuple[Form, ...] = ("grouped", "separable", "dense")
CPU = "CPUExecutionProvider"
FEWEST_REPEATS, MOST_REPEATS = 3, 40
ENOUGH_MS = 14.0
"""A layer is repeated until the measured runs of its fastest form add up to this, within the two limits above."""
SAVE_EVERY_S = 20.0
HOPELESS = 2.0
"""A form whose first measured run takes this many times the fastest form's is not run again."""


class TimingTable:
    """Shortest time in ms of layer shapes in each form, measured when first asked for, kept in a JSON file.

    Attributes:
        path: the file, or None to keep the table in memory.
        provider: ONNX Runtime's execution provider.
        machine: what the times belong to (processor, threads, versions), compared with the file's.
        times_ms: key of shape and form -> ms.
    """

    def __init__(self, path: Path | None, machine: Mapping[str, Any], provider: str = CPU) -> None:
        """
        Raises:
            UserError: the file holds times of another machine, provider or version.
        """
        self.path, self.provider = path, provider
        self.machine = {key: str(value) for key, value in machine.items()} | {"provider": provider}
        self.times_ms: dict[str, float] = {}
        self._saved_s = time.monotonic()
        if path is not None and path.is_file():
            content = json.loads(path.read_text())
            if content.get("machine") != self.machine:
                raise UserError(f"{path}: times of another machine or version; delete it or name another file")
            self.times_ms = content["times_ms"]

    def time_ms(self, shape: LayerShape, form: Form) -> float:
        """Time of a shape in a form; a plain layer (rank 0) has the form "dense" only."""
        key = shape.key(form)
        if key not in self.times_ms:
            self.measure(shape)
        return self.times_ms[key]

    def measure(self, shape: LayerShape) -> None:
        """Time all forms of a shape in alternation; the file is written now and then."""
        forms: tuple[Form, ...] = FORMS if shape.rank else ("dense",)
        missing = [form for form in forms if shape.key(form) not in self.times_ms]
        for form, time_ms in zip(missing, time_alternating(shape, missing, self.provider), strict=True):
            self.times_ms[shape.key(form)] = time_ms
        if time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()

    def fastest(self, shape: LayerShape) -> tuple[Form, float]:
        """The fastest form of a shape and its time in ms."""
        forms: tuple[Form, ...] = FORMS if shape.rank else ("dense",)
        times = {form: self.time_ms(shape, form) for form in forms}
        best = min(times, key=times.__getitem__)
        return best, times[best]

    def save(self) -> None:
        """Write the table, whole or not at all."""
        self._saved_s = time.monotonic()
        if self.path is None:
            return
        with atomic_write(self.path, "w") as stream:
            json.dump({"machine": self.machine, "times_ms": self.times_ms}, stream, indent=1, sort_keys=True)


@dataclass(frozen=True)
class BlockTuning:
    """The forms of one CPDBlock, all its calls in one image added up.

    Attributes:
        name: the block.
        times_ms: form -> time.
        form: the fastest.
        original_ms: time of the dense layer that the block was made from, None if it is not known.
    """

    name: str
    times_ms: dict[Form, float]
    form: Form
    original_ms: float | None

    @property
    def verdict(self) -> str:
        """One line for a report."""
        parts = ", ".join(f"{form} {time_ms:.2f} ms" for form, time_ms in self.times_ms.items())
        if self.form == "dense":
            text = f"{self.name}: stays dense, its factors would be slower ({parts})"
        else:
            text = f"{self.name}: {self.form} ({parts})"
        return text if self.original_ms is None else f"{text}; before compression {self.original_ms:.2f} ms"


def tune_blocks(
    calls: Iterable[LayerCall], table: TimingTable, original: Iterable[LayerCall] = ()
) -> list[BlockTuning]:
    """The fastest form of every CPDBlock among `calls`.

    Args:
        calls: of the compressed model (`layer_calls`).
        table: where the times come from and stay.
        original: calls of the dense model, for comparison.

    Returns:
        One entry per block, in the order of the calls. `{t.name: t.form for t in ...}` is what
        `norton_deploy.compression.lowering.lower_model` takes as `forms`.
    """
    before_ms: dict[str, float] = {}
    for call in original:
        before_ms[call.name] = before_ms.get(call.name, 0.0) + table.time_ms(call.shape, "dense")
    totals: dict[str, dict[Form, float]] = {}
    for call in calls:
        if call.shape.rank:
            times = totals.setdefault(call.name, dict.fromkeys(FORMS, 0.0))
            for form in FORMS:
                times[form] += table.time_ms(call.shape, form)
    table.save()
    return [
        BlockTuning(name, times, min(times, key=times.__getitem__), before_ms.get(name))
        for name, times in totals.items()
    ]


def time_alternating(shape: LayerShape, forms: Iterable[Form], provider: str) -> list[float]:
    """Shortest time in ms of a layer in each form, the forms taking turns.

    The shortest of few runs, not their median: whatever else the machine does can only lengthen a run.

    On the CPU the times are those of the layer's own nodes by ONNX Runtime's profiler: a graph of one layer also
    pays for converting its input and output to the engine's memory layout, which a whole graph does not. On other
    providers it is the synchronised time of the whole run. Long layers are run three times, short ones more often;
    a form that is out of the question after one measured run keeps that one.

    Raises:
        UserError: the provider did not start.
    """
    from norton_deploy.cost.session import make_session

    with tempfile.TemporaryDirectory() as folder:
        sessions, feeds = [], []
        for index, form in enumerate(forms):
            content, example = layer_graph(shape, form)
            profile = Path(folder) / str(index) if provider == CPU else None
            sessions.append(make_session(content, providers=[provider], profile_prefix=profile))
            feeds.append({"input": example})
        for session, feed in zip(sessions, feeds, strict=True):
            session.run(None, feed)  # The first run allocates.
        wall_ms: list[list[float]] = [[] for _ in sessions]
        running = list(range(len(sessions)))
        for repeat in range(MOST_REPEATS):
            for index in running:
                started = time.perf_counter()
                sessions[index].run(None, feeds[index])
                wall_ms[index].append((time.perf_counter() - started) * 1e3)
            fastest_ms = min((sum(wall_ms[index]) for index in running), default=math.inf)
            if repeat == 0:
                running = [index for index in running if wall_ms[index][0] <= HOPELESS * fastest_ms]
            if repeat + 1 >= FEWEST_REPEATS and fastest_ms >= ENOUGH_MS:
                break
        if provider != CPU:
            return [min(times) for times in wall_ms]
        return [
            _node_time_ms(Path(session.end_profiling()), 1 + len(times))
            for session, times in zip(sessions, wall_ms, strict=True)
        ]


def _node_time_ms(profile: Path, runs: int) -> float:
    """Shortest of all runs but the first: the layer's nodes' time, layout changes left out."""
    events = json.loads(profile.read_text())
    durations = [
        event["dur"] / 1e3
        for event in events
        if event.get("cat") == "Node"
        and event["name"].endswith("_kernel_time")
        and not event["args"]["op_name"].startswith("Reorder")
    ]
    by_run = np.asarray(durations).reshape(runs, -1).sum(axis=1)
    return float(by_run[1:].min())

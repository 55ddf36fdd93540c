"""Which exact form each CPDBlock runs fastest in, on the engine that will run it: measured, not assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.compression.lowering import Form
from norton_deploy.cost.complexity import LayerCall, LayerShape
from norton_deploy.result_file import ResultFile
from norton_deploy.search.layer_timing import FORMS, INT8, TimedEngine, forms_of, time_forms

SAVE_EVERY_S = 20.0


class TimingTable:
    """Shortest time in ms of layer shapes in each form, measured when first asked for, kept in a JSON file.

    Attributes:
        engine: that runs the layers.
        times_ms: key of shape and form -> ms.
    """

    def __init__(self, path: Path | None, machine: Mapping[str, Any], engine: TimedEngine = "onnxruntime") -> None:
        """
        Args:
            path: the file, or None to keep the table in memory.
            machine: what the times belong to (processor, threads, versions), compared with the file's.
            engine: that runs the layers.

        Raises:
            UserError: the file holds times of another machine, engine or version.
        """
        self.engine: TimedEngine = engine
        settings = {key: str(value) for key, value in machine.items()} | {"engine": engine}
        otherwise = "times of another machine or version; delete the file or name another"
        self._file = ResultFile(path, settings, otherwise=otherwise, every_s=SAVE_EVERY_S)
        self.times_ms: dict[str, float] = self._file.cells

    def time_ms(self, shape: LayerShape, form: Form) -> float:
        """Time of a shape in a form; a plain layer (rank 0) has the form "dense" only."""
        key = self._key(shape, form)
        if key not in self.times_ms:
            self.measure(shape)
        return self.times_ms[key]

    def measure(self, shape: LayerShape) -> None:
        """Time all forms of a shape in turn; the file is written now and then."""
        missing = [form for form in forms_of(shape) if self._key(shape, form) not in self.times_ms]
        times_ms = time_forms(shape, missing, self.engine)
        self._file.add({self._key(shape, form): time_ms for form, time_ms in zip(missing, times_ms, strict=True)})

    def fastest(self, shape: LayerShape) -> tuple[Form, float]:
        """The fastest form of a shape and its time in ms."""
        times = {form: self.time_ms(shape, form) for form in forms_of(shape)}
        best = min(times, key=times.__getitem__)
        return best, times[best]

    def _key(self, shape: LayerShape, form: Form) -> str:
        return shape.key(form) + (" in float" if shape.in_float and self.engine.endswith(INT8) else "")

    def save(self) -> None:
        """Write the table, whole or not at all."""
        self._file.save()


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

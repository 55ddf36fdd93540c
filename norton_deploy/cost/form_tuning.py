"""Which exact form each CPDBlock runs fastest in, on the engine that will run it: measured, not assumed."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.compression.lowering import Form
from norton_deploy.cost.complexity import LayerCall, LayerShape
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.files import ResultFile

FORMS: tuple[Form, ...] = ("grouped", "separable", "dense")
OPSET, IR_VERSION = 20, 10
CPU = "CPUExecutionProvider"
FEWEST_REPEATS, MOST_REPEATS = 3, 40
ENOUGH_MS = 14.0
"""A layer is repeated so often that the runs of its fastest form add up to this, within the two limits above."""
SAVE_EVERY_S = 20.0
CUDA_RUNS = 10
"""Runs of a layer between two events on a GPU: one small layer is done before the next can be launched."""
HOPELESS = 2.0
"""A form whose first measured run takes this many times the fastest form's is not run again."""


class TimingTable:
    """Shortest time in ms of layer shapes in each form, measured when first asked for, kept in a JSON file.

    Attributes:
        provider: ONNX Runtime's execution provider.
        times_ms: key of shape and form -> ms.
    """

    def __init__(self, path: Path | None, machine: Mapping[str, Any], provider: str = CPU) -> None:
        """
        Args:
            path: the file, or None to keep the table in memory.
            machine: what the times belong to (processor, threads, versions), compared with the file's.
            provider: that runs the layers.

        Raises:
            UserError: the file holds times of another machine, provider or version.
        """
        self.provider = provider
        settings = {key: str(value) for key, value in machine.items()} | {"provider": provider}
        otherwise = "times of another machine or version; delete the file or name another"
        self._file = ResultFile(path, settings, otherwise=otherwise, every_s=SAVE_EVERY_S)
        self.times_ms: dict[str, float] = self._file.cells

    def time_ms(self, shape: LayerShape, form: Form) -> float:
        """Time of a shape in a form; a plain layer (rank 0) has the form "dense" only."""
        key = shape.key(form)
        if key not in self.times_ms:
            self.measure(shape)
        return self.times_ms[key]

    def measure(self, shape: LayerShape) -> None:
        """Time all forms of a shape in turn; the file is written now and then."""
        missing = [form for form in forms_of(shape) if shape.key(form) not in self.times_ms]
        times_ms = time_forms(shape, missing, self.provider)
        self._file.add({shape.key(form): time_ms for form, time_ms in zip(missing, times_ms, strict=True)})

    def fastest(self, shape: LayerShape) -> tuple[Form, float]:
        """The fastest form of a shape and its time in ms."""
        times = {form: self.time_ms(shape, form) for form in forms_of(shape)}
        best = min(times, key=times.__getitem__)
        return best, times[best]

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


def forms_of(shape: LayerShape) -> tuple[Form, ...]:
    """The forms that a layer can run in."""
    return FORMS if shape.rank else ("dense",)


def time_forms(shape: LayerShape, forms: Iterable[Form], provider: str) -> list[float]:
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

    stream, runs = (None, 1) if provider == CPU else (_new_stream(), CUDA_RUNS)
    clock = time.perf_counter if stream is None else stream_clock(stream)
    with tempfile.TemporaryDirectory() as folder:
        sessions, calls = [], {}
        for index, form in enumerate(forms):
            content, example = layer_graph(shape, form)
            profile = Path(folder) / str(index) if provider == CPU else None
            handle = None if stream is None else stream.cuda_stream
            session = make_session(content, providers=[provider], profile_prefix=profile, cuda_stream=handle)
            sessions.append(session)
            calls[str(index)] = bound_call(session, example, "cpu" if provider == CPU else "cuda", runs)
        first = time_in_turns(calls, rounds=1, warm_up=1, clock=clock)  # The very first run allocates.
        runs_ms = {name: list(first.of(name)) for name in calls}
        fastest_ms = first.times_ms.min()
        running = {name: call for name, call in calls.items() if runs_ms[name][0] <= HOPELESS * fastest_ms}
        rounds = min(MOST_REPEATS, max(FEWEST_REPEATS, math.ceil(ENOUGH_MS / fastest_ms))) - 1
        rest = time_in_turns(running, rounds=rounds, warm_up=0, clock=clock)
        for name in running:
            runs_ms[name] += list(rest.of(name))
        if provider != CPU:
            return [min(times) / runs for times in runs_ms.values()]
        return [
            _node_time_ms(Path(session.end_profiling()), 1 + len(times))
            for session, times in zip(sessions, runs_ms.values(), strict=True)
        ]


def bound_call(session: Any, example: npt.NDArray[np.float32], device: str, runs: int) -> Callable[[int], None]:
    """A call of a session some times in a row, its input and output where it computes, none waiting for the next."""
    from norton_deploy.cost.session import onnxruntime

    binding, options = session.io_binding(), onnxruntime.RunOptions()
    binding.bind_ortvalue_input("input", onnxruntime.OrtValue.ortvalue_from_numpy(example, device, 0))
    binding.bind_output(session.get_outputs()[0].name, device, 0)
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(device == "cuda")))

    def call(_step: int) -> None:
        for _ in range(runs):
            session.run_with_iobinding(binding, options)

    return call


def _new_stream() -> Any:
    import torch

    return torch.cuda.Stream()


def stream_clock(stream: Any) -> Callable[[], float]:
    """A clock of seconds on a CUDA stream, read when all that was put there before is done."""
    import torch

    started = torch.cuda.Event(enable_timing=True)
    started.record(stream)

    def seconds() -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record(stream)
        now.synchronize()
        return started.elapsed_time(now) / 1e3

    return seconds


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


def layer_graph(shape: LayerShape, form: Form) -> tuple[bytes, npt.NDArray[np.float32]]:
    """An ONNX model of one layer with random weights, and an input for it.

    A plain layer has the form "dense" only. The convolutions are those of `lower_block`.
    """
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []

    def add(operator: str, weight_shape: tuple[int, ...], width: int, **attributes: Any) -> None:
        index = len(nodes)
        fan_in = max(1, int(np.prod(weight_shape)) // width)
        weight = generator.standard_normal(weight_shape, np.float32) / np.float32(np.sqrt(fan_in))
        weights.append(numpy_helper.from_array(weight, f"weight_{index}"))
        weights.append(numpy_helper.from_array(np.zeros(width, np.float32), f"bias_{index}"))
        source = f"value_{index}" if index else "input"
        nodes.append(
            helper.make_node(
                operator, [source, f"weight_{index}", f"bias_{index}"], [f"value_{index + 1}"], **attributes
            )
        )

    batch, height, width = shape.input_size
    inputs, outputs, terms = shape.in_channels, shape.out_channels, shape.rank * shape.out_channels
    (kernel_h, kernel_w), (stride_h, stride_w) = shape.kernel, shape.stride
    (pad_h, pad_w), (dilation_h, dilation_w) = shape.padding, shape.dilation
    geometry = {
        "strides": [stride_h, stride_w],
        "pads": [pad_h, pad_w, pad_h, pad_w],
        "dilations": [dilation_h, dilation_w],
    }
    if shape.kind == "linear":
        add("Gemm", (outputs, inputs), outputs, transB=1)
    elif shape.kind == "transposed":
        add("ConvTranspose", (inputs, outputs, kernel_h, kernel_w), outputs, **geometry)
    elif form == "dense":
        add("Conv", (outputs, inputs // shape.groups, kernel_h, kernel_w), outputs, group=shape.groups, **geometry)
    else:
        add("Conv", (terms, inputs, 1, 1), terms)
        if form == "grouped":
            add("Conv", (outputs, shape.rank, kernel_h, kernel_w), outputs, group=outputs, **geometry)
        else:
            add("Conv", (terms, 1, 1, kernel_w), terms, group=terms, strides=[1, stride_w],
                pads=[0, pad_w, 0, pad_w], dilations=[1, dilation_w])  # fmt: skip
            add("Conv", (outputs, shape.rank, kernel_h, 1), outputs, group=outputs, strides=[stride_h, 1],
                pads=[pad_h, 0, pad_h, 0], dilations=[dilation_h, 1])  # fmt: skip
    input_shape = [batch, inputs] if shape.kind == "linear" else [batch, inputs, height, width]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info(f"value_{len(nodes)}", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString(), generator.standard_normal(input_shape, np.float32)

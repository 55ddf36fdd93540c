"""Times of single layers on the engine that will run them."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from norton_deploy.compression.lowering import Form
from norton_deploy.cost.complexity import LayerShape
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.export.quantise import cpu_of_this_machine, with_rounding

FORMS: tuple[Form, ...] = ("grouped", "separable", "dense")
TimedEngine = Literal[
    "onnxruntime", "onnxruntime-int8", "onnxruntime-cuda", "openvino", "openvino-bf16", "openvino-int8"
]
"""ONNX Runtime or OpenVINO on the CPU, in fp32, bf16 or 8 bits; ONNX Runtime on a GPU."""
INT8 = "-int8"
STAND_IN = (-4.0, 4.0)
"""Range of every tensor between layers in 8 bits: nearly all of a normal distribution."""
OPSET, IR_VERSION = 20, 10
FEWEST_REPEATS, MOST_REPEATS = 3, 40
ENOUGH_MS = 14.0
"""A layer is repeated so often that the runs of its fastest form add up to this, within the two limits above."""
CUDA_RUNS = 10
"""Runs of a layer between two events on a GPU: one small layer is done before the next can be launched."""
HOPELESS = 2.0
"""A form whose first measured run takes this many times the fastest form's is not run again."""
NOT_THE_LAYER = ("Input", "Output", "Reorder", "Convert", "Subgraph", "Transpose", "Quantize", "Dequantize")
"""What kinds of nodes begin with that an engine puts around a graph of one layer."""


def forms_of(shape: LayerShape) -> tuple[Form, ...]:
    """The forms that a layer can run in."""
    return FORMS if shape.rank else ("dense",)


def time_forms(shape: LayerShape, forms: Iterable[Form], engine: TimedEngine) -> list[float]:
    """Shortest time in ms of a layer in each form, the forms taking turns.

    The shortest of few runs, not their median: whatever else the machine does can only lengthen a run.

    On the CPU the times are those of the layer's own nodes by the engine's profiler: a graph of one layer also
    pays for converting its input and output to the engine's memory layout, which a whole graph does not. On a GPU
    it is the synchronised time of the whole run. Long layers are run three times, short ones more often;
    a form that is out of the question after one measured run keeps that one. 8 bits are those of `export/quantise.py`.

    Raises:
        UserError: the engine is not installed or did not start.
    """
    graphs = [layer_graph(shape, form) for form in forms]
    if engine == "onnxruntime-cuda":
        return _on_cuda(graphs)
    if engine.endswith(INT8) and not shape.in_float:
        graphs = [(in_8_bits(content), example) for content, example in graphs]
    return _in_openvino(graphs, engine) if engine.startswith("openvino") else _in_onnxruntime(graphs)


Graphs = list[tuple[bytes, npt.NDArray[np.float32]]]


def _in_turns(calls: Mapping[str, Callable[[int], object]], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Call -> ms of its measured runs; one run comes before them, which allocates."""
    first = time_in_turns(calls, rounds=1, warm_up=1, clock=clock)
    runs_ms = {name: list(first.of(name)) for name in calls}
    fastest_ms = first.times_ms.min()
    running = {name: call for name, call in calls.items() if runs_ms[name][0] <= HOPELESS * fastest_ms}
    rounds = min(MOST_REPEATS, max(FEWEST_REPEATS, math.ceil(ENOUGH_MS / fastest_ms))) - 1
    rest = time_in_turns(running, rounds=rounds, warm_up=0, clock=clock)
    for name in running:
        runs_ms[name] += list(rest.of(name))
    return runs_ms


def _in_onnxruntime(graphs: Graphs) -> list[float]:
    from norton_deploy.cost.session import CPU, make_session

    with tempfile.TemporaryDirectory() as folder:
        sessions, calls = [], {}
        for index, (content, example) in enumerate(graphs):
            session = make_session(content, providers=[CPU], profile_prefix=Path(folder) / str(index))
            sessions.append(session)
            calls[str(index)] = bound_call(session, example, "cpu", 1)
        runs_ms = _in_turns(calls, time.perf_counter)
        return [
            _node_time_ms(Path(session.end_profiling()), 1 + len(times))
            for session, times in zip(sessions, runs_ms.values(), strict=True)
        ]


def _on_cuda(graphs: Graphs) -> list[float]:
    import torch

    from norton_deploy.cost.session import CUDA, make_session

    stream, calls = torch.cuda.Stream(), {}
    for index, (content, example) in enumerate(graphs):
        session = make_session(content, providers=[CUDA], cuda_stream=stream.cuda_stream)
        calls[str(index)] = bound_call(session, example, "cuda", CUDA_RUNS)
    return [min(times) / CUDA_RUNS for times in _in_turns(calls, stream_clock(stream)).values()]


def _in_openvino(graphs: Graphs, engine: TimedEngine) -> list[float]:
    from norton_deploy.cost.openvino_session import openvino_core, openvino_settings

    settings = openvino_settings("bf16" if engine == "openvino-bf16" else "f32", profile=True)
    nodes_ms: list[list[float]] = []
    calls: dict[str, Callable[[int], object]] = {}
    for content, example in graphs:
        request = openvino_core().compile_model(openvino_core().read_model(content), "CPU", settings)
        times: list[float] = []
        nodes_ms.append(times)
        calls[str(len(calls))] = _profiled_call(request.create_infer_request(), example, times)
    _in_turns(calls, time.perf_counter)
    return [min(times[1:]) for times in nodes_ms]


def _profiled_call(request: Any, example: npt.NDArray[np.float32], times_ms: list[float]) -> Callable[[int], None]:
    """A call that adds the time of the layer's own nodes to `times_ms`."""

    def call(_step: int) -> None:
        request.infer([example], share_inputs=True)
        spent = (
            node.real_time for node in request.get_profiling_info() if not node.node_type.startswith(NOT_THE_LAYER)
        )
        times_ms.append(sum(time.total_seconds() for time in spent) * 1e3)

    return call


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
        and not event["args"]["op_name"].startswith(NOT_THE_LAYER)
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
                operator,
                [source, f"weight_{index}", f"bias_{index}"],
                [f"value_{index + 1}"],
                f"layer_{index}",
                **attributes,
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


def in_8_bits(content: bytes) -> bytes:
    """A graph of one layer with 8 bits, as a calibrated graph has them on this machine."""
    from onnx import load_model_from_string, shape_inference

    model = shape_inference.infer_shapes(load_model_from_string(content))
    nodes = list(model.graph.node)
    ranges = {name: STAND_IN for node in nodes for name in (node.input[0], node.output[0])}
    rounded = with_rounding(model, ranges, nodes, cpu=cpu_of_this_machine(), symmetric=False)
    result: bytes = rounded.SerializeToString()
    return result

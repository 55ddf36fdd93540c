"""Exported graphs in 8 bits: QuantizeLinear and DequantizeLinear around convolutions and linear layers.

Which layers: all convolutions and linear layers but the stem, the last layers of every head (what RPN and heads put
out), transposed convolutions and whatever the caller leaves out. RoIAlign's products, NMS and the arithmetic of boxes
are no layers and stay in float. Between quantised layers, what only moves or joins their results (residual sums, the
pyramid's sums and upsampling, pooling) is quantised too, so that an engine never has to leave the 8 bits.

Weights are symmetric and have a scale for each output channel. Activations have one range for a tensor, from
calibration images: unsigned with a zero point for CPUs, symmetric for TensorRT, which knows nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from norton_deploy.cost.session import make_session
from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.graph_digest import signed
from norton_deploy.export.onnx_export import STAGE_PREFIX, metadata_of
from norton_deploy.files import atomic_write

LAYERS = ("Conv", "Gemm")
JOINTS = ("Add", "MaxPool", "Relu", "Resize")
"""Operators that are quantised where all they read comes from quantised layers."""
LAST_STAGES = tuple(STAGE_PREFIX + name for name in ("rpn_", "class_logits", "box_deltas", "heatmaps"))
"""Tensors whose layers stay in float: what RPN and heads put out."""
SAMPLES = 2**18
"""Values of each tensor that its range is taken from, over all images."""
NARROWED = np.linspace(1.0, 0.3, 29)
"""Shares of the full range that are tried."""
JUDGED = 2**16
"""Values that each share is judged by."""
Cpu = Literal["avx2", "vnni", "amx"]
Ranges = dict[str, tuple[float, float]]


def cpu_of_this_machine() -> Cpu:
    """What its CPU multiplies 8 bits with; avx2 where that cannot be told."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "avx2"
    return "amx" if "amx_int8" in flags else "vnni" if flags & {"avx512_vnni", "avx_vnni"} else "avx2"


def quantisable_layers(model: Any) -> dict[str, list[Any]]:
    """Layer, named as in the detector -> its nodes, in the graph's order.

    A head that the pyramid's levels share has a node for each of them.

    Args:
        model: an onnx.ModelProto of `export_onnx`.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in LAYERS and node.input[1] in weights]
    layers: dict[str, list[Any]] = {}
    for node in nodes[1:]:  # the first is the stem
        if not node.output[0].startswith(LAST_STAGES):
            name = node.input[1].removeprefix("detector.").removesuffix(".weight")
            layers.setdefault(name, []).append(node)
    return layers


def calibrate(model: Any, batches: Sequence[npt.NDArray[Any]]) -> Ranges:
    """The range of every tensor that a quantised graph may round.

    The graph itself takes a sample of each tensor, so that memory does not grow with image size or number of images.

    Args:
        model: an onnx.ModelProto of `export_onnx`; not changed.
        batches: inputs of the graph.

    Returns:
        tensor -> lowest and highest value, 0 included.
    """
    from onnx import TensorProto, helper, numpy_helper

    names = sorted({name for node in _rounded_nodes(model, quantisable_layers(model)) for name in _tensors(node)})
    sampled = copy.deepcopy(model)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    graph = sampled.graph
    del graph.output[:]
    for name, values in (("sample/flat", [-1]), ("sample/start", [0]), ("sample/end", [2**62])):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    wanted = max(SAMPLES // len(batches), 1)
    for index, name in enumerate(names):
        size = math.prod(side.dim_value for side in shapes[name])
        step = max(size // wanted, 1)
        while math.gcd(step, size) > 1:  # or it would see some columns of a map only
            step += 1
        graph.initializer.append(numpy_helper.from_array(np.array([step], np.int64), f"sample/step{index}"))
        flat, taken = f"sample/flat{index}", f"sample/{index}"
        graph.node.append(helper.make_node("Reshape", [name, "sample/flat"], [flat]))
        ends = ["sample/start", "sample/end", "sample/start", f"sample/step{index}"]
        graph.node.append(helper.make_node("Slice", [flat, *ends], [taken]))
        graph.output.append(helper.make_tensor_value_info(taken, TensorProto.FLOAT, None))
    session = make_session(sampled.SerializeToString(), "cpu")
    runs = [session.run(None, {graph.input[0].name: batch}) for batch in batches]
    ranges: Ranges = {}
    for name, samples in zip(names, zip(*runs, strict=True), strict=True):
        ranges[name] = least_square_range(np.concatenate(samples))
    return ranges


def least_square_range(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """The range whose 256 levels leave the least squared error: rounding inside it against clipping outside.

    Args:
        values: any number of a tensor's.

    Returns:
        Lowest and highest value, 0 included: a share of the full range.
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    judged = values[:: max(len(values) // JUDGED, 1)]

    def error(share: float) -> float:
        step = max((high - low) * share / 255, 1e-30)
        zero = round(-low * share / step)
        levels = np.clip(np.rint(judged / step), -zero, 255 - zero)
        return float(np.square(levels * step - judged).sum())

    best = float(min(NARROWED, key=error))
    return low * best, high * best


def quantised(
    model: Any, ranges: Ranges, *, float_layers: Collection[str] = (), cpu: Cpu = "vnni", symmetric: bool = False
) -> Any:
    """A graph with Q/DQ around its layers.

    Args:
        model: an onnx.ModelProto of `export_onnx`; not changed.
        ranges: of `calibrate`.
        float_layers: layers that are left as they are, by the names of `quantisable_layers`.
        cpu: with "avx2" weights have 7 bits, because pairs of 8-bit products overflow there.
        symmetric: activations signed and without zero point, and only inputs of layers rounded, as TensorRT wants it.

    Raises:
        UserError: a layer that is not there.
    """
    layers = quantisable_layers(model)
    unknown = sorted(set(float_layers) - set(layers))
    if unknown:
        raise UserError(f"layers to leave in float: {', '.join(unknown)}: no such layer; there are {', '.join(layers)}")
    chosen = {name: nodes for name, nodes in layers.items() if name not in float_layers}
    rounded = _rounded_nodes(model, chosen)
    if symmetric:
        rounded = [node for node in rounded if node.op_type in LAYERS]
    result = with_rounding(model, ranges, rounded, cpu=cpu, symmetric=symmetric)
    _name_what_is_read(result)
    known = {value.name for value in result.graph.value_info}
    stages = [v for v in model.graph.value_info if v.name.startswith(STAGE_PREFIX) and v.name not in known]
    result.graph.value_info.extend(stages)
    return result


def with_rounding(model: Any, ranges: Ranges, nodes: Sequence[Any], *, cpu: Cpu, symmetric: bool) -> Any:
    """A graph with Q/DQ around the nodes that are given.

    Args:
        model: an onnx.ModelProto with its shapes inferred; not changed.
        ranges: of the tensors that these nodes read and write.
        nodes: layers and joints of it.
        cpu, symmetric: see `quantised`.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    changed = copy.deepcopy(model)
    if not nodes:  # to the quantizer no nodes mean all nodes
        return changed
    _own_biases(changed, {node.name for node in nodes if node.op_type in LAYERS})
    found = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        changed,
        per_channel=True,
        reduce_range=cpu == "avx2" and not symmetric,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, found),
        nodes_to_quantize=[node.name for node in nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=[*LAYERS, *JOINTS],
        extra_options={
            "ActivationSymmetric": symmetric,
            "QuantizeBias": not symmetric,  # TensorRT dequantises 8 bits only, a bias has 32
            "OpTypesToExcludeOutputQuantization": list(LAYERS) if symmetric else [],
        },
    )
    quantizer.quantize_model()
    return quantizer.model.model


def write_quantised(
    model: Any,
    contract: GraphContract,
    out: Path,
    ranges: Ranges,
    *,
    cpu: Cpu = "vnni",
    float_layers: Collection[str] = (),
) -> GraphContract:
    """Write an exported fp32 graph in 8 bits, whole or not at all.

    Args:
        model: an onnx.ModelProto of `export_onnx`, in fp32; not changed.
        contract: what stands in it.
        out: the .onnx file.
        ranges: of `calibrate`.
        cpu, float_layers: see `quantised`; TensorRT's graphs have 8 bits whatever the CPU.

    Returns:
        The contract in the file.

    Raises:
        UserError: a layer that is not there, or the file cannot be written.
    """
    from onnx import helper

    symmetric = contract.target == "tensorrt"
    result = quantised(model, ranges, float_layers=float_layers, cpu=cpu, symmetric=symmetric)
    bits = 7 if cpu == "avx2" and not symmetric else 8
    contract = replace(contract, precision="int8", float_layers=tuple(sorted(float_layers)), weight_bits=bits)
    entries = metadata_of(contract)
    result.doc_string = entries["description"]
    helper.set_model_props(result, entries)
    with atomic_write(out) as stream:
        stream.write(signed(result.SerializeToString()))
    return contract


def _rounded_nodes(model: Any, layers: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The nodes of the layers and the joints between them, in the graph's order."""
    chosen = {node.name for nodes in layers.values() for node in nodes}
    constants = {tensor.name for tensor in model.graph.initializer}
    rounded: list[Any] = []
    written: set[str] = set()
    for node in model.graph.node:
        read = [name for name in node.input if name and name not in constants]
        joins = node.op_type in JOINTS and read and written.issuperset(read)
        if node.name in chosen or joins:
            rounded.append(node)
            written.update(node.output)
    return rounded


def _tensors(node: Any) -> list[str]:
    """The activations that a node reads and writes; of a resize or pooling its sizes are no activations."""
    inputs = node.input if node.op_type == "Add" else node.input[:1]
    return [*inputs, *node.output]


def _name_what_is_read(model: Any) -> None:
    """Give a stage's name to the rounded tensor, which is what the next stage reads.

    The quantizer folds a ReLU into the rounding of its input, whose lowest level is 0, and calls that input by the
    ReLU's name: what had the stage's name would be below 0 too.
    """
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    written = [(node, place) for node in model.graph.node for place in range(len(node.output))]
    for writer, place in written:
        stage = writer.output[place]
        rounding = readers.get(stage, [])
        is_rounded = [node.op_type for node in rounding] == ["QuantizeLinear"]
        if stage.startswith(STAGE_PREFIX) and is_rounded and writer.op_type != "DequantizeLinear":
            (restored,) = readers[rounding[0].output[0]]
            for node in readers[restored.output[0]]:
                node.input[:] = [stage if name == restored.output[0] else name for name in node.input]
            writer.output[place] = rounding[0].input[0] = f"unrounded/{stage}"
            restored.output[0] = stage


def _own_biases(model: Any, nodes: Collection[str]) -> None:
    """Give every node that shares its bias with another one of its own, since a bias is rounded to its input's scale;
    a bias of zeros goes. The quantizer would do so itself, and call the copy `val_365` beside a node that writes a
    `val_365`."""
    from onnx import TensorProto, numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    taken: set[str] = set()
    for node in model.graph.node:
        if node.name not in nodes or len(node.input) < 3:
            continue
        bias = node.input[2]
        if not numpy_helper.to_array(tensors[bias]).any():
            del node.input[2]
            continue
        if bias in taken:
            own = TensorProto()
            own.CopyFrom(tensors[bias])
            own.name = node.input[2] = f"{bias}/{node.name}"
            model.graph.initializer.append(own)
        taken.add(bias)

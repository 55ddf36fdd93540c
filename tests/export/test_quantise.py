"""int8 graphs: which layers have 8 bits, how ranges are taken, how the worst layers are found."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from reduced_detectors import IMAGE_SIZE, blobs

from norton_deploy.cost.session import make_session
from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import read_contract
from norton_deploy.export.quantise import (
    Ranges,
    calibrate,
    cpu_of_this_machine,
    least_square_range,
    quantisable_layers,
    quantised,
    write_quantised,
)
from norton_deploy.export.quantise_sensitivity import HeadErrors
from norton_deploy.export.tensorrt_build import build_engine
from norton_deploy.inference.loading import load_predictor
from norton_deploy.parity.comparison import relative_error
from norton_deploy.parity.gate import check_parity
from norton_deploy.parity.graph_parts import CuttableGraph
from norton_deploy.search.latency_budget import Workload
from norton_deploy.structures import Task

Calibrated = tuple[Any, Path, Any, Ranges]


@pytest.fixture(scope="module")
def calibrated(exported: Callable) -> Callable[[str], Calibrated]:
    """target -> mask detector, its fp32 graph as a file and loaded, its ranges on two batches; each once."""
    made: dict[str, Calibrated] = {}

    def make(target: str) -> Calibrated:
        if target not in made:
            detector, path = exported("mask", target)
            model = onnx.load(path)
            made[target] = detector, path, model, calibrate(model, batches())
        return made[target]

    return make


def batches() -> list[np.ndarray]:
    images = blobs(4, seed=9).numpy()
    return [images[:2], images[2:]]


def written_by(model: Any) -> dict[str, Any]:
    return {name: node for node in model.graph.node for name in node.output}


def bits_of_layers(model: Any) -> dict[str, int]:
    """Layer -> bits of its weight: 8, or 32 where it is float."""
    producers, found = written_by(model), {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            producer = producers.get(node.input[1])
            name = node.input[1] if producer is None else producer.input[0]
            found[name.removeprefix("detector.").partition(".weight")[0]] = 32 if producer is None else 8
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_all_layers_but_stem_and_last_ones_have_8_bits(target: str, calibrated: Callable) -> None:
    _, _, model, ranges = calibrated(target)
    graph = quantised(model, ranges, symmetric=target == "tensorrt")
    float_layers = {name for name, bits in bits_of_layers(graph).items() if bits == 32}
    assert float_layers == {
        "backbone.body.conv1", "rpn.head.cls_logits", "rpn.head.bbox_pred",
        "box_head.predictor.cls_score", "box_head.predictor.bbox_pred",
    }  # fmt: skip
    producers = written_by(graph)
    products = [node for node in graph.graph.node if node.op_type in ("MatMul", "ConvTranspose", "TopK")]
    assert not any(producers[node.input[1]].op_type == "DequantizeLinear" for node in products if
                   node.input[1] in producers)  # fmt: skip
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    activations = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    points = {(str(tensors[node.input[2]].dtype), int(tensors[node.input[2]])) for node in activations}
    if target == "tensorrt":
        assert points == {("int8", 0)}
        stored = [node for node in graph.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
        assert {str(tensors[node.input[0]].dtype) for node in stored} == {"int8"}  # a bias of 32 bits TensorRT refuses
    else:
        assert {dtype for dtype, _ in points} == {"uint8"} and len(points) > 1
        shared = [node for node in graph.graph.node if node.op_type == "Conv" and "rpn" in "".join(node.input[2:])]
        assert len({node.input[2] for node in shared}) >= 5  # five levels, each with a bias of its own scale


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_the_planner_times_those_layers_in_float_that_a_graph_has_in_float(task: Task, exported: Callable) -> None:
    detector, path = exported(task, "onnxruntime")
    calls = Workload.of(detector, IMAGE_SIZE).calls(detector)
    rounded = {call.name for call in calls if not call.shape.in_float}
    assert 30 < len(rounded) == len(quantisable_layers(onnx.load(path)))


def test_ranges_are_those_of_the_least_squared_error() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 200_000).astype(np.float32)
    low, high = least_square_range(values)
    # 256 levels of a normal distribution: best from -3.9 to 3.9 deviations (numerically, from its density)
    assert high - low == pytest.approx(2 * 3.9, abs=0.3)
    assert least_square_range(np.linspace(1, 100, 10_001, dtype=np.float32)) == (0.0, 100.0)  # nothing to leave out
    outlier = np.append(np.abs(values), np.float32(6.0))
    assert least_square_range(outlier)[0] == 0.0 and 3.5 < least_square_range(outlier)[1] < 5.0
    assert least_square_range(np.zeros(3, np.float32)) == (0.0, 0.0)


def test_calibration_sees_every_image_of_a_tensor() -> None:
    values = np.linspace(1, 100, 100_001, dtype=np.float32)
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "detector.a.weight")
    nodes = [
        helper.make_node("Conv", ["images", "detector.a.weight"], ["x"], "stem"),
        helper.make_node("Conv", ["x", "detector.a.weight"], ["y"], "layer"),
    ]
    shape = [1, 1, 1, len(values)]
    info = [helper.make_tensor_value_info(name, 1, shape) for name in ("images", "x", "y")]
    graph = helper.make_graph(nodes, "g", info[:1], info[2:], [weight], value_info=info)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    low, high = calibrate(model, [values.reshape(shape), -values.reshape(shape)])["x"]
    assert low == pytest.approx(-100, abs=0.01) and high == pytest.approx(100, abs=0.01)
    assert calibrate(model, [values.reshape(shape)])["x"][0] == 0.0
    assert list(quantisable_layers(model)) == ["a"]


def test_graph_in_8_bits_detects_nearly_what_the_model_does(calibrated: Callable, tmp_path: Path) -> None:
    detector, path, model, ranges = calibrated("onnxruntime")
    out = tmp_path / "int8.onnx"
    left = ["backbone.body.layer1.0.conv1"]
    contract = write_quantised(model, read_contract(path), out, ranges, cpu="avx2", float_layers=left)
    assert contract == read_contract(out)
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(out.read_bytes().replace(b"in int8", b"in fp32"))
    with pytest.raises(UserError, match="it was changed"):
        read_contract(changed)
    assert (contract.precision, contract.weight_bits, contract.float_layers) == ("int8", 7, tuple(left))
    assert bits_of_layers(onnx.load(out))[left[0]] == 32
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(out).graph.initializer]
    assert max(int(np.abs(values).max()) for values in weights if values.dtype == np.int8 and values.ndim > 1) <= 64
    assert out.stat().st_size < 0.5 * path.stat().st_size
    images = list(blobs(2, seed=5).numpy())
    for predictor in (None, load_predictor(out, backend="openvino")):
        report = check_parity(detector, out, images, precision="int8", predictor=predictor)  # type: ignore[arg-type]
        stages = {stage.name: stage for stage in report.stages if stage.measure == "relative root mean square"}
        assert 1e-4 < stages["rpn"].worst < 0.2 and 1e-4 < stages["boxes"].worst < 0.2
        final = {stage.measure: stage for stage in report.stages if stage.name == "final"}
        assert final["share of unmatched detections"].passed and final["box IoU"].passed
        assert final["score difference"].passed and report.detections > 30


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("capability", ["86", "89"])
def test_an_int8_graph_becomes_an_rtx_engine(capability: str, calibrated: Callable, tmp_path: Path) -> None:
    _, path, model, ranges = calibrated("tensorrt")
    graph, engine = tmp_path / "int8.onnx", tmp_path / "int8.engine"
    write_quantised(model, read_contract(path), graph, ranges)
    manifest = build_engine(graph, engine, engine="tensorrt-rtx", compute_capability=capability)
    assert (manifest.compute_capability, manifest.contract.precision) == (capability, "int8")


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_copied_bias_takes_no_name_that_is_taken(symmetric: bool) -> None:
    weights = [numpy_helper.from_array(np.full((1, 1, 1, 1), 2.0, np.float32), f"detector.{name}.weight")
               for name in "sab"]  # fmt: skip
    bias = numpy_helper.from_array(np.ones(1, np.float32), "val")
    nodes = [
        helper.make_node("Conv", ["images", "detector.s.weight"], ["x"], "stem"),
        helper.make_node("Conv", ["x", "detector.a.weight", "val"], ["a"], "a"),
        helper.make_node("Conv", ["a", "detector.b.weight", "val"], ["b"], "b"),
        *(helper.make_node("Neg", ["b"], [f"val{index}"], f"neg{index}") for index in range(3)),
        helper.make_node("Sum", ["val0", "val1", "val2"], ["y"], "sum"),
    ]
    names = ("images", "x", "a", "b", "y", "val0", "val1", "val2")
    info = [helper.make_tensor_value_info(name, 1, [1, 1, 1, 2]) for name in names]
    graph = helper.make_graph(nodes, "g", info[:1], info[4:5], [*weights, bias], value_info=info)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    values = np.array([1.0, -1.0], np.float32).reshape(1, 1, 1, 2)
    rounded = quantised(model, calibrate(model, [values]), symmetric=symmetric)
    (found,) = make_session(rounded.SerializeToString(), "cpu").run(["y"], {"images": values})
    np.testing.assert_allclose(found.ravel(), [-33.0, 15.0], atol=1.0)


def test_a_stage_is_what_the_next_one_reads(calibrated: Callable, tmp_path: Path) -> None:
    _, path, model, ranges = calibrated("onnxruntime")
    out = tmp_path / "int8.onnx"
    write_quantised(model, read_contract(path), out, ranges)
    names = [f"body.{level}" for level in range(4)] + [f"fpn.{level}" for level in range(4)]
    feed = {"images": batches()[0]}
    expected, found = (CuttableGraph(file).part(names)(feed) for file in (path, out))
    for name in names:
        assert len(np.unique(found[name])) <= 256
        assert (expected[name].min() < 0) == (found[name].min() < 0)
        assert relative_error({name: expected[name]}, found) < 0.2


def test_a_spoilt_layer_of_the_body_is_seen_there(calibrated: Callable, tmp_path: Path) -> None:
    detector, path, model, ranges = calibrated("onnxruntime")
    out, read = tmp_path / "int8.onnx", quantisable_layers(model)["backbone.body.layer4.0.conv2"][0].input[0]
    write_quantised(model, read_contract(path), out, {**ranges, read: (0.0, 1e-3 * ranges[read][1])})
    report = check_parity(detector, out, list(blobs(2, seed=5).numpy()), precision="int8")
    assert report.first_failure is not None and report.first_failure.name == "backbone"


def test_files_hold_nothing_that_can_be_computed(calibrated: Callable) -> None:
    _, _, model, ranges = calibrated("onnxruntime")
    graph = quantised(model, ranges).graph
    biases = [tensor for tensor in graph.initializer if tensor.name.endswith(".bias_quantized")]
    assert biases and all(numpy_helper.to_array(bias).any() for bias in biases)
    assert sum(tensor.ByteSize() for tensor in graph.initializer if "anchors" in tensor.name) < 2000
    assert not any(node.metadata_props for node in graph.node)


@pytest.mark.slow
def test_the_worst_layer_is_found_and_left_out(calibrated: Callable) -> None:
    _, _, model, ranges = calibrated("onnxruntime")
    spoilt = dict(ranges)
    name, nodes = list(quantisable_layers(model).items())[5]
    spoilt[nodes[0].input[0]] = (0.0, 1e-3 * ranges[nodes[0].input[0]][1])
    errors = HeadErrors(model, spoilt, batches()[:1], symmetric=False)
    few = copy.copy(errors)
    few.layers = errors.layers[3:9]
    good = HeadErrors(model, ranges, batches()[:1], symmetric=False).of(few.layers)
    writer = "backbone.body.layer2.0.conv1"  # whose output is the spoilt tensor
    assert set(list(few.each())[:2]) == {writer, name}
    assert set(few.left_out(1.5 * good)) == {writer, name}
    assert few.left_out(10.0) == []
    with pytest.raises(UserError, match="still above"):
        few.left_out(1e-9)


def test_what_is_chosen_on_the_way_is_given(calibrated: Callable) -> None:
    _, _, model, ranges = calibrated("onnxruntime")
    errors = HeadErrors(model, ranges, batches()[:1], symmetric=False)
    assert not any(errors.by_head([]).values())
    by_head = errors.by_head(["box_head.head.fc7"])  # moves boxes and labels, which the mask head reads
    assert by_head["stage/box_deltas"] > 1e-4 and by_head["masks"] == 0


def test_mistakes(calibrated: Callable) -> None:
    _, _, model, ranges = calibrated("onnxruntime")
    with pytest.raises(UserError, match="no such layer; there are"):
        quantised(model, ranges, float_layers=["fc9"])


@pytest.mark.parametrize(
    ("flags", "cpu"),
    [("avx2 avx512f", "avx2"), ("avx2 avx_vnni", "vnni"), ("avx512_vnni amx_tile amx_int8", "amx"), (None, "avx2")],
)
def test_the_cpu_is_read_off_the_machine(flags: str | None, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, **_: Any) -> str:
        if flags is None:
            raise OSError
        return f"flags : fpu {flags}"

    monkeypatch.setattr(Path, "read_text", read)
    assert cpu_of_this_machine() == cpu

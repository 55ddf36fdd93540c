"""Channels of equal range between the two convolutions of a decomposed layer."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from norton_deploy.cost.session import make_session
from norton_deploy.export.equalise import equalised
from norton_deploy.export.quantise import calibrate, quantised

LENGTHS = np.array([1.0, 30.0, 0.1, 5.0, 1.0, 300.0], np.float32)


def decomposed(bias: float = 0.0) -> Any:
    """A stem, and a layer of 3 filters of rank 2 whose terms' factors have the lengths LENGTHS and 1 / LENGTHS."""
    generator = np.random.default_rng(0)
    pointwise = generator.normal(size=(6, 4, 1, 1)) * LENGTHS[:, None, None, None]
    kernels = generator.normal(size=(3, 2, 3, 3)) / LENGTHS.reshape(3, 2, 1, 1)
    weights = {
        "detector.stem.weight": np.eye(4).reshape(4, 4, 1, 1),
        "detector.a.0.weight": pointwise,
        "bias": np.full(6, bias),
        "detector.a.1.weight": kernels,
    }
    nodes = [
        helper.make_node("Conv", ["images", "detector.stem.weight"], ["x"], "stem"),
        helper.make_node("Conv", ["x", "detector.a.0.weight", "bias"], ["terms"], "pointwise"),
        helper.make_node("Conv", ["terms", "detector.a.1.weight"], ["y"], "grouped", group=3),
    ]
    shapes = {"images": [1, 4, 9, 9], "x": [1, 4, 9, 9], "terms": [1, 6, 9, 9], "y": [1, 3, 7, 7]}
    info = {name: helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        nodes, "g", [info["images"]], [info["y"]],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
        value_info=[info["x"], info["terms"], info["y"]],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model: Any, images: np.ndarray, *names: str) -> list[np.ndarray]:
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    del changed.graph.output[:]
    changed.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
    return make_session(changed.SerializeToString(), "cpu").run(None, {"images": images})  # type: ignore[no-any-return]


def test_the_function_stays_and_channels_have_one_range() -> None:
    model = decomposed()
    batches = list(np.random.default_rng(1).normal(size=(3, 1, 4, 9, 9)).astype(np.float32))
    changed = equalised(model, batches)
    for images in batches:
        assert run(changed, images, "y")[0] == pytest.approx(run(model, images, "y")[0], rel=1e-4, abs=1e-4)
    largest = np.max([np.abs(run(changed, images, "terms")[0]).max(axis=(0, 2, 3)) for images in batches], axis=0)
    assert largest == pytest.approx(np.full(6, largest[0]), rel=1e-4)


def test_8_bits_lose_less() -> None:
    model = decomposed()
    batches = list(np.random.default_rng(1).normal(size=(3, 1, 4, 9, 9)).astype(np.float32))
    [expected] = run(model, batches[0], "y")

    def error(graph: Any) -> float:
        [found] = run(quantised(graph, calibrate(graph, batches)), batches[0], "y")
        return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))

    assert error(equalised(model, batches)) < 0.02 < 0.2 < error(model)


def test_a_bias_between_the_factors_is_left_alone() -> None:
    model = decomposed(bias=1.0)
    images = np.ones((1, 4, 9, 9), np.float32)
    assert equalised(model, [images]).SerializeToString() == model.SerializeToString()

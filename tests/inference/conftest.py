"""A tiny graph that finds the bright rectangle in an image, with the metadata of a real export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

GraphWriter = Callable[..., Path]
TYPES = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}


def write_graph(
    path: Path,
    task: str = "box",
    image_size: tuple[int, int] = (32, 48),
    batch: int = 1,
    dtype: str = "uint8",
    graph_dtype: str | None = None,
    skip_output: str | None = None,
    flag: bool | None = None,
    metadata: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write the graph; `changes` and `metadata` replace metadata entries, `graph_dtype` makes them a lie.

    Its one detection (label 1, score 1) is the bounding box of all pixels brighter than half; the mask is
    full in the left half of the box; the two keypoints are the box's corners.
    """
    height, width = image_size
    bytes_in = (graph_dtype or dtype) == "uint8"
    shape = [batch, height, width, 3] if bytes_in else [batch, 3, height, width]
    constants: dict[str, np.ndarray] = {
        "half": np.float32(127.5 if bytes_in else 0.5).reshape(1),
        "channel": np.array([3 if bytes_in else 1], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "first": np.array([-1], np.int64),
        "last": np.array([-(2**31)], np.int64),
        "step": np.array([-1], np.int64),
        "limits": np.array([[width, height]], np.float32),
        "box_shape": np.array([batch, 1, 4], np.int64),
        "score_shape": np.array([batch, 1], np.int64),
        "flat": np.array([batch], np.int64),
        "point_shape": np.array([batch, 1, 2, 2], np.int64),
        "point_scores": np.ones((batch, 1, 2, 1), np.float32),
        "mask": np.tile(np.float32(np.arange(28) < 14), (batch, 1, 28, 1)),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["float_images"], to=TensorProto.FLOAT),
        node("Greater", ["float_images", "half"], ["bright"]),
        node("Cast", ["bright"], ["bright_float"], to=TensorProto.FLOAT),
        node("ReduceMax", ["bright_float", "channel"], ["plane"], keepdims=0),
        node("ReduceMax", ["plane", "one"], ["columns"], keepdims=0),
        node("ReduceMax", ["plane", "two"], ["rows"], keepdims=0),
    ]
    for axis in ("columns", "rows"):
        nodes += [
            node("Slice", [axis, "first", "last", "one", "step"], [f"{axis}_back"]),
            node("ArgMax", [axis], [f"{axis}_start"], axis=1, keepdims=1),
            node("ArgMax", [f"{axis}_back"], [f"{axis}_tail"], axis=1, keepdims=1),
        ]
    for end in ("start", "tail"):
        nodes += [
            node("Concat", [f"columns_{end}", f"rows_{end}"], [f"{end}_int"], axis=1),
            node("Cast", [f"{end}_int"], [end], to=TensorProto.FLOAT),
        ]
    nodes += [
        node("Sub", ["limits", "tail"], ["stop"]),
        node("Concat", ["start", "stop"], ["flat_box"], axis=1),
        node("Reshape", ["flat_box", "box_shape"], ["boxes"]),
        node("ReduceMax", ["columns", "one"], ["found"], keepdims=0),
        node("Reshape", ["found", "score_shape"], ["scores"]),
        node("Cast", ["scores"], ["labels"], to=TensorProto.INT64),
        node("Cast", ["found"], ["num_detections"], to=TensorProto.INT32),
        node("Identity", ["mask"], ["masks"]),
        node("Reshape", ["flat_box", "point_shape"], ["points"]),
        node("Concat", ["points", "point_scores"], ["keypoints"], axis=3),
    ]
    outputs = {
        "num_detections": (TensorProto.INT32, [batch]),
        "boxes": (TensorProto.FLOAT, [batch, 1, 4]),
        "scores": (TensorProto.FLOAT, [batch, 1]),
        "labels": (TensorProto.INT64, [batch, 1]),
    }
    if task == "mask":
        outputs["masks"] = (TensorProto.FLOAT, [batch, 1, 28, 28])
    if task == "keypoint":
        outputs["keypoints"] = (TensorProto.FLOAT, [batch, 1, 2, 3])
    if flag is not None:
        outputs["nms_converged"] = (TensorProto.BOOL, [1])
        constants["flag"] = np.array([flag])
        nodes.append(node("Identity", ["flag"], ["nms_converged"]))
    graph = helper.make_graph(
        nodes,
        "bright_rectangle",
        [helper.make_tensor_value_info("images", TYPES[graph_dtype or dtype], shape)],
        [helper.make_tensor_value_info(n, *spec) for n, spec in outputs.items() if n != skip_output],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    contract = {
        "format": 2,
        "task": task,
        "image_size": list(image_size),
        "input_size": list(image_size),
        "batch": batch,
        "max_detections": 1,
        "categories": {"labels": [1], "ids": [7], "names": ["lamp"]},
        "input_dtype": dtype,
        "outputs": [
            {"name": name, "dtype": TensorProto.DataType.Name(kind).lower(), "shape": shape}
            for name, (kind, shape) in outputs.items()
        ],
        "target": "onnxruntime",
        "precision": "fp32",
        "weights_sha256": "0" * 64,
        "resize": "letterbox",
        "score_threshold": 0.0,
        "mask_paste": "whole_pixels",
    }
    contract |= changes | (metadata or {})
    helper.set_model_props(model, {"norton_deploy": json.dumps(contract)})
    onnx.save(model, path)
    return path


@pytest.fixture
def graph(tmp_path: Path) -> GraphWriter:
    """Writes bright-rectangle graphs into the test's folder: graph(name="a.onnx", task=..., ...) -> path."""

    def write(name: str = "model.onnx", **options: Any) -> Path:
        return write_graph(tmp_path / name, **options)

    return write


@pytest.fixture
def lamp() -> Callable[..., np.ndarray]:
    """lamp(image_size, box) -> black uint8 RGB image [H, W, 3] with a white rectangle at the xyxy box."""

    def draw(image_size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
        image = np.zeros((*image_size, 3), np.uint8)
        x1, y1, x2, y2 = box
        image[y1:y2, x1:x2] = 255
        return image

    return draw

"""Exported graphs in ONNX Runtime against eager mode."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from altered_graphs import save_signed
from onnx import numpy_helper
from reduced_detectors import IMAGE_SIZE, blobs

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.onnx_export import read_contract
from norton_deploy.export.static_rcnn import TARGETS, Target
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.parity.gate import check_parity
from norton_deploy.structures import TASKS, Task

DYNAMIC = {"NonZero", "NonMaxSuppression", "RoiAlign", "Loop", "If", "Scan", "Unique", "Compress", "SequenceAt"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "task", ["mask", *(pytest.param(task, marks=pytest.mark.slow) for task in ("box", "keypoint"))]
)
def test_graph_equals_eager_mode_in_every_stage(task: Task, target: Target, exported: Callable) -> None:
    model, path = exported(task, target)
    report = check_parity(model, path, list(blobs(3, seed=5).numpy()))
    assert report.passed, report.table()
    assert report.detections == 80 and report.images == 4  # the second batch of 2 is filled up
    assert report.inexact == {"nms_converged": 0, "candidates_complete": 0}
    names = [stage.name for stage in report.stages]
    assert list(dict.fromkeys(names))[:6] == ["backbone", "fpn", "rpn", "boxes", "given proposals", "given detections"]
    assert {"box": "final", "mask": "given masks", "keypoint": "given keypoints"}[task] in names


@pytest.mark.parametrize("task", TASKS)
def test_tensorrt_target_is_static(task: Task, exported: Callable) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(exported(task, "tensorrt")[1]), data_prop=True).graph
    assert not {node.op_type for node in graph.node} & DYNAMIC
    assert {node.domain for node in graph.node} == {""}
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output, *graph.input)]
    assert all(side.HasField("dim_value") for shape in shapes for side in shape)


def test_contract(exported: Callable) -> None:
    model, path = exported("mask", "onnxruntime")
    contract = read_contract(path)
    assert contract.task == "mask" and contract.image_size == contract.input_size == IMAGE_SIZE
    assert (contract.batch, contract.max_detections) == (2, 20)
    assert contract.weights_sha256 == tensors_digest(model.state_dict())
    assert contract.score_threshold == 0.05 and contract.resize == "letterbox"
    assert {output.name: (output.dtype, output.shape) for output in contract.outputs} == {
        "num_detections": ("int32", (2,)),
        "boxes": ("float", (2, 20, 4)),
        "scores": ("float", (2, 20)),
        "labels": ("int32", (2, 20)),
        "masks": ("float", (2, 20, 16, 16)),
        "nms_converged": ("bool", (1,)),
        "candidates_complete": ("bool", (1,)),
    }
    fields = contract.to_json()
    assert (fields["format"], fields["input_name"], fields["input_dtype"]) == (2, "images", "uint8")
    assert GraphContract.from_json(json.loads(json.dumps(fields)), "again") == contract


def change_weight(path: Path, out: Path, part: str) -> None:
    """Write a copy of a graph in which one weight tensor whose name has `part` is 2 % larger."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if part in t.name and len(t.dims) > 1)
    values = np.array(numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(values * np.float32(1.02), tensor.name))
    save_signed(model, out)


@pytest.mark.parametrize(
    ("part", "stage"),
    [("body.layer3.0.conv1", "backbone"), ("fpn.layer_blocks", "fpn"), ("rpn.head", "rpn"), ("fc7", "boxes"),
     ("mask_head", "given masks")],
)  # fmt: skip
def test_gate_names_the_first_stage_that_is_off(part: str, stage: str, exported: Callable, tmp_path: Path) -> None:
    model, path = exported("mask", "onnxruntime")
    change_weight(path, tmp_path / "changed.onnx", part)
    report = check_parity(model, tmp_path / "changed.onnx", list(blobs(2, seed=5).numpy()))
    assert not report.passed
    with pytest.raises(UserError, match=f"first in stage '{stage}'"):
        report.require()


def test_an_engines_outputs_are_compared_as_the_last_stage(exported: Callable) -> None:
    model, path = exported("box", "onnxruntime")
    engine = OnnxRuntimePredictor(path, device="cpu")
    run = engine.run
    engine.run = lambda batch: (found := run(batch)) | {"boxes": found["boxes"] + 1}  # type: ignore[method-assign]
    images = list(blobs(2, seed=5).numpy())
    with pytest.raises(UserError, match="first in stage 'final'"):
        check_parity(model, path, images, predictor=engine).require()
    with pytest.raises(UserError, match="was not made from"):
        check_parity(*exported("mask", "onnxruntime"), images, predictor=engine)


def test_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_contract(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="not an ONNX file"):
        read_contract(tmp_path / "broken.onnx")
    onnx.save(onnx.ModelProto(), tmp_path / "empty.onnx")
    with pytest.raises(UserError, match="metadata"):
        read_contract(tmp_path / "empty.onnx")

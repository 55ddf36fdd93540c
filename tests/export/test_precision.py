"""fp16 graphs: what is half, what is not, and how far they are from fp32 in ONNX Runtime."""

from collections import Counter
from collections.abc import Callable

import onnx
import pytest
import torch
from reduced_detectors import blobs
from torch import nn

from norton_deploy.export.precision import Float32
from norton_deploy.parity.gate import check_parity
from norton_deploy.structures import TASKS, Task

HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
ALWAYS_FLOAT = {"Softmax", "Sigmoid", "Exp", "Sqrt", "TopK", "Floor", "Div", "Min"}


@pytest.mark.parametrize(
    ("task", "seed"),
    [
        *(("mask", seed) for seed in (5, 6, 7)),
        *(pytest.param(task, 5, marks=pytest.mark.slow) for task in ("box", "keypoint")),
    ],
)
def test_fp16_graph_of_a_compressed_detector_keeps_to_its_tolerances(task: Task, seed: int, exported: Callable) -> None:
    model, path = exported(task, "tensorrt", "fp16", True)
    report = check_parity(model, path, list(blobs(4, seed=seed).numpy()), precision="fp16")
    assert report.precision == "fp16" and report.detections == 80
    assert report.passed, report.table()


@pytest.mark.parametrize("task", TASKS)
def test_every_operator_has_the_precision_that_the_module_promises(task: Task, exported: Callable) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(exported(task, "tensorrt", "fp16", True)[1])).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    convolutions = Counter(types[node.input[1]] for node in graph.node if node.op_type == "Conv")
    assert convolutions[FLOAT] == 10 and convolutions[HALF] > 30  # fp32: the RPN's two last layers, 5 levels
    for node in graph.node:
        if node.op_type in ALWAYS_FLOAT:
            assert types[node.output[0]] != HALF, node.name
        if node.op_type == "TopK":
            assert types[node.input[0]] == FLOAT
    outputs = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    assert HALF not in outputs.values() and outputs["boxes"] == FLOAT


def test_group_norm_computes_in_fp32_between_casts() -> None:
    norm = nn.GroupNorm(2, 4)
    x = (torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 3000).half()
    found = Float32(norm, keep=False)(x)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float16
    torch.testing.assert_close(found, norm(x.float()).half())

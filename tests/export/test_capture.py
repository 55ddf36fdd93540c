"""Whether a CUDA graph could record the static module, without a GPU: fake CUDA tensors find what it could not.

A graph records kernels. It cannot record that the host reads a value (`.item()`, shapes that depend on data), nor that
it makes a tensor from numbers and copies it over; and operands on two devices fail on any GPU.
"""

import copy
from typing import Any, Literal

import pytest
import torch
from reduced_detectors import IMAGE_SIZE, compressed_detector, reduced_detector
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from norton_deploy.compression.lowering import lower_model
from norton_deploy.export.precision import to_fp16
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.inference.torch_graph import FrameDetector
from norton_deploy.structures import TASKS, Task

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "lift_fresh")


class HostTraffic(TorchDispatchMode):
    """Collects what a CUDA graph could not record."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        crosses = name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor) and args[0].device != result.device
        if crosses or name in READS:
            self.found.append(func.name())
        return result


def traffic(static: torch.nn.Module, frames: torch.Size) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What crosses between host and GPU in one call, and the (fake) outputs."""
    on_gpu = copy.deepcopy(static)
    with FakeTensorMode():
        for module in on_gpu.modules():
            for name, weight in module.named_parameters(recurse=False):
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        images = torch.empty(frames, dtype=torch.uint8, device="cuda")
        with torch.no_grad(), HostTraffic() as host:
            outputs = on_gpu(images)
    return host.found, outputs


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_nothing_crosses_between_host_and_gpu(task: Task, precision: Literal["fp32", "fp16"]) -> None:
    settings = GraphSettings(IMAGE_SIZE, batch=2, target="tensorrt", nms_iterations=4)
    static = StaticRCNN(lower_model(compressed_detector(task)), settings)
    if precision == "fp16":
        to_fp16(static)
    found, outputs = traffic(static, torch.Size((2, *IMAGE_SIZE, 3)))
    assert found == []
    assert {tensor.device.type for tensor in outputs.values()} == {"cuda"}


def test_nothing_crosses_where_the_graph_resizes_frames() -> None:
    settings = GraphSettings(IMAGE_SIZE, target="tensorrt", nms_iterations=4, input_size=(90, 160))
    static = StaticRCNN(lower_model(reduced_detector("keypoint")), settings)
    assert traffic(static, torch.Size((1, 90, 160, 3)))[0] == []


@pytest.mark.parametrize(("task", "float_type"), [("box", "fp16"), ("mask", "fp32"), ("keypoint", "fp16")])
def test_nothing_crosses_where_the_models_own_resizing_is_inside(task: Task, float_type: str) -> None:
    frames = FrameDetector(lower_model(reduced_detector(task)), (90, 160), 2, float_type)
    found, outputs = traffic(frames, torch.Size((2, 90, 160, 3)))
    assert found == [] and {tensor.device.type for tensor in outputs.values()} == {"cuda"}


def test_what_the_tests_above_would_catch() -> None:
    static = StaticRCNN(lower_model(reduced_detector("box")), GraphSettings(IMAGE_SIZE, target="tensorrt"))
    static.box_head.register_forward_hook(
        lambda _module, _inputs, outputs: (outputs[0] * outputs[0].new_tensor(2.0), outputs[1])
    )
    assert "aten::lift_fresh" in traffic(static, torch.Size((1, *IMAGE_SIZE, 3)))[0]

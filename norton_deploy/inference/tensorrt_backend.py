"""Engines of TensorRT and TensorRT-RTX. The CUDA part of this module has not been executed on a GPU.

What a machine without one can check is tested: manifests, buffer plans, and the errors that come before the
first CUDA call. Buffers live in torch's CUDA memory, so nothing but torch and TensorRT is needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.tensorrt_build import PORTABLE, EngineManifest, EngineUnavailableError, engine_package
from norton_deploy.inference.static_graph import Outputs, StaticGraphPredictor
from norton_deploy.inference.torch_backend import choose_device

TORCH_DTYPES = {
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class BufferPlan:
    """One input or output tensor of an engine.

    Attributes:
        name: tensor name.
        shape: fixed shape.
        dtype: NumPy's name of its type.
        is_input: whether the engine reads it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_input: bool

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def check_runtime(path: Path, manifest: EngineManifest, version: str, capability: tuple[int, int]) -> None:
    """Refuse an engine that was built by another version or for another GPU; neither can be loaded.

    Args:
        path: the engine, for the message.
        manifest: its manifest.
        version: of the installed TensorRT or TensorRT-RTX.
        capability: (major, minor) compute capability of the GPU.

    Raises:
        UserError: one of them differs.
    """
    built_by = manifest.engine_version
    if version != built_by:
        raise UserError(
            f"{path}: built by {manifest.engine} {built_by}, installed is {version}; build the engine again"
        )
    built_for, found = manifest.compute_capability, f"{capability[0]}{capability[1]}"
    if built_for not in (PORTABLE, found):
        raise UserError(f"{path}: built for compute capability {built_for}, this GPU has {found}; build it again")


def plan_buffers(engine: Any, package: ModuleType, contract: GraphContract, source: str) -> list[BufferPlan]:
    """The engine's tensors, checked against the contract; all shapes are fixed.

    Args:
        engine: an ICudaEngine.
        package: tensorrt or tensorrt_rtx.
        contract: from the manifest.
        source: for the message.

    Raises:
        UserError: the input differs from the contract, an output is missing, or a shape is not fixed.
    """
    plans = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = tuple(engine.get_tensor_shape(name))
        dtype = np.dtype(package.nptype(engine.get_tensor_dtype(name))).name
        if min(shape, default=1) < 0 or dtype not in TORCH_DTYPES:
            raise UserError(f"{source}: tensor '{name}' is {dtype} {list(shape)}; fixed shapes are needed")
        is_input = engine.get_tensor_mode(name) == package.TensorIOMode.INPUT
        plans.append(BufferPlan(name, shape, dtype, is_input))
    inputs = [(plan.name, plan.shape, plan.dtype) for plan in plans if plan.is_input]
    expected = (contract.input_name, contract.input_shape, contract.input_dtype)
    if inputs != [expected]:
        raise UserError(f"{source}: inputs {inputs} contradict the manifest {expected}; build it again")
    missing = set(contract.output_names) - {plan.name for plan in plans if not plan.is_input}
    if missing:
        raise UserError(f"{source}: the engine lacks the outputs {', '.join(sorted(missing))}; build it again")
    return plans


class TensorRTPredictor(StaticGraphPredictor):
    """An engine with fixed device buffers, pinned host buffers, one stream and, where possible, a CUDA graph.

    TensorRT-RTX captures the graph itself; with TensorRT it is captured through torch after a first ordinary
    run. If the capture fails, runs stay ordinary launches and `device` says so.
    """

    backend = "tensorrt"

    def __init__(self, path: Path, score_threshold: float | None = None, device: str | None = None) -> None:
        """Check the manifest, then load the engine.

        Args:
            path: the `.engine` file, with its manifest beside it.
            score_threshold: see `load_predictor`.
            device: "cuda" or "cuda:N".

        Raises:
            UserError: manifest, GPU, package or version do not fit (see `check_runtime`).
        """
        manifest = EngineManifest.load(path)
        super().__init__(str(path), manifest.contract, score_threshold)
        if not torch.cuda.is_available() or device == "cpu":
            raise UserError(f"{path}: an engine runs on an NVIDIA GPU only, and none is used here; run the .onnx")
        self._device = choose_device(device)
        try:
            package = engine_package(manifest.engine)
        except EngineUnavailableError as error:
            raise UserError(f"{path}: {error}") from error
        check_runtime(path, manifest, str(package.__version__), torch.cuda.get_device_capability(self._device))
        with torch.cuda.device(self._device):
            self._load(path, package)
        gpu = torch.cuda.get_device_name(self._device)
        self.device = f"{manifest.engine} {package.__version__}, {gpu}, {self._launch}"

    def _load(self, path: Path, package: ModuleType) -> None:
        """Deserialise, allocate and bind; the engine object must outlive its context."""
        self._runtime = package.Runtime(package.Logger(package.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise UserError(f"{path}: {package.__name__} cannot deserialise this engine; build it on this machine")
        plans = plan_buffers(self._engine, package, self.contract, str(path))
        captures_itself = hasattr(package, "CudaGraphStrategy")
        if captures_itself:
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = package.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._context = self._engine.create_execution_context(config)
        else:
            self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream(self._device)
        self._on_device = {
            plan.name: torch.zeros(plan.shape, dtype=TORCH_DTYPES[plan.dtype], device=self._device) for plan in plans
        }
        self._pinned = {
            plan.name: torch.zeros(plan.shape, dtype=TORCH_DTYPES[plan.dtype], pin_memory=True) for plan in plans
        }
        for name, buffer in self._on_device.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        torch.cuda.synchronize(self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._execute()
        self._stream.synchronize()
        self._launch = "CUDA graph by the engine" if captures_itself else self._capture()

    def _capture(self) -> str:
        """Record the engine's launches once; returns how it will be launched, in words."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._execute()
        except (RuntimeError, UserError) as error:
            # A loop whose length depends on data cannot be recorded; ordinary launches give the same result.
            return f"no CUDA graph ({str(error).splitlines()[0]})"
        self._graph = graph
        return "CUDA graph"

    def _execute(self) -> None:
        """Put one run on the stream."""
        if self._graph is not None:
            with torch.cuda.stream(self._stream):
                self._graph.replay()
        elif not self._context.execute_async_v3(self._stream.cuda_stream):
            raise UserError(f"{self.name}: the engine refused to run; see TensorRT's messages above")

    def run(self, batch: npt.NDArray[np.generic]) -> Outputs:
        names = self.contract.output_names
        started = time.perf_counter()
        with torch.cuda.stream(self._stream):
            pinned = self._pinned[self.contract.input_name]
            pinned.numpy()[...] = batch
            self._on_device[self.contract.input_name].copy_(pinned, non_blocking=True)
            self._stream.synchronize()
            started = self.timing.add("copy_ms", started)
            self._execute()
            self._stream.synchronize()
            started = self.timing.add("infer_ms", started)
            for name in names:
                self._pinned[name].copy_(self._on_device[name], non_blocking=True)
            self._stream.synchronize()
        outputs: Outputs = {name: self._pinned[name].numpy().copy() for name in names}
        self.timing.add("copy_ms", started)
        return outputs

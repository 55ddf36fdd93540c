"""Engines of TensorRT and TensorRT-RTX. The CUDA part of this module has not been executed on a GPU.

What a machine without one can check is tested: manifests, buffer plans, and the errors that come before the
first CUDA call. Buffers live in torch's CUDA memory, so nothing but torch and TensorRT is needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.tensorrt_build import PORTABLE, Engine, EngineManifest, EngineUnavailableError, engine_package
from norton_deploy.files import atomic_write
from norton_deploy.inference.cuda_graph import InFlight
from norton_deploy.inference.static_graph import Outputs, Start, StaticGraphPredictor
from norton_deploy.inference.torch_backend import choose_device

logger = logging.getLogger(__name__)
TORCH_DTYPES = {
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
}


WARM_UP_S = 0.3
"""A GPU at rest needs some tenths of a second to reach its clocks; two calls do not take that long."""


@dataclass(frozen=True)
class BufferPlan:
    """One input or output tensor of an engine.

    Attributes:
        dtype: NumPy's name of its type.
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


def same_results(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two runs on one input agree, but for sums in another order."""
    return torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-3)


def make_context(engine: Any, package: ModuleType, path: Path) -> tuple[Any, Any]:
    """An engine's execution context, and TensorRT-RTX's runtime cache (None for TensorRT), filled from `cache_path`.

    TensorRT-RTX compiles its kernels at the first run; with the cache only once on a machine. A cache of another
    version or GPU is not taken, and made anew.

    Raises:
        UserError: the engine gives no context, as when memory is short.
    """
    cache = None
    if hasattr(package, "CudaGraphStrategy"):
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = package.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache = config.create_runtime_cache()
        if cache_path(path).is_file():
            cache.deserialize(cache_path(path).read_bytes())
        config.set_runtime_cache(cache)
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        raise UserError(
            f"{path}: {package.__name__} made no execution context; is there enough free GPU memory for "
            f"{engine.device_memory_size_v2 / 2**20:.0f} MiB of activations?"
        )
    return context, cache


def cache_path(engine_path: Path) -> Path:
    """TensorRT-RTX's kernels for `model.engine` on this machine are kept in `model.engine.cache`."""
    return Path(f"{engine_path}.cache")


def save_cache(cache: Any, engine_path: Path) -> None:
    """Keep compiled kernels for the next start; a folder that cannot be written to only costs that start's time."""
    target, content = cache_path(engine_path), bytes(cache.serialize())
    if not content or (target.is_file() and target.read_bytes() == content):
        return
    try:
        with atomic_write(target) as stream:
            stream.write(content)
    except UserError as error:
        logger.info("%s", error)


class TensorRTPredictor(StaticGraphPredictor):
    """An engine with fixed device buffers, pinned host buffers, one stream and, where possible, a CUDA graph.

    TensorRT-RTX captures the graph itself, where the engine's stream can be captured; with TensorRT it is captured
    through torch after a first ordinary run, and kept if a replay gives that run's results. Otherwise runs stay
    ordinary launches; `device` says which.
    """

    backend = "tensorrt"

    def __init__(self, path: Path, score_threshold: float | None = None, device: str | None = None) -> None:
        """Check the manifest, then load the engine.

        Args:
            path: the `.engine` file, with its manifest beside it.

        Raises:
            UserError: manifest, GPU, package or version do not fit (see `check_runtime`).
        """
        manifest = EngineManifest.load(path)
        super().__init__(str(path), manifest.contract, score_threshold)
        if not torch.cuda.is_available() or device == "cpu":
            raise UserError(f"{path}: an engine runs on an NVIDIA GPU only, and none is used here; run the .onnx")
        self._device = choose_device(device)
        try:
            package = engine_package(cast(Engine, manifest.engine))  # by its suffix
        except EngineUnavailableError as error:
            raise UserError(f"{path}: {error}") from error
        check_runtime(path, manifest, str(package.__version__), torch.cuda.get_device_capability(self._device))
        with torch.cuda.device(self._device):
            self._load(path, package)
        gpu = torch.cuda.get_device_name(self._device)
        self.device = f"{manifest.engine} {package.__version__}, {gpu}, {self._launch}"

    def _load(self, path: Path, package: ModuleType) -> None:
        """Deserialise, allocate and bind; the engine object must outlive its context."""
        self._package = package
        self._runtime = package.Runtime(package.Logger(package.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise UserError(f"{path}: {package.__name__} cannot deserialise this engine; build it on this machine")
        plans = plan_buffers(self._engine, package, self.contract, str(path))
        self._context, cache = make_context(self._engine, package, path)
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
        if cache is None:
            self._launch = self._capture()
        else:
            save_cache(cache, path)
            capturable = self._context.is_stream_capturable(self._stream.cuda_stream)
            self._launch = "CUDA graph by the engine" if capturable else "no CUDA graph (its stream cannot be captured)"
        self._warm_up()

    def _warm_up(self) -> None:
        """Run until the clocks are up."""
        started = time.perf_counter()
        while time.perf_counter() - started < WARM_UP_S:
            self._execute()
            self._stream.synchronize()

    def _capture(self) -> str:
        """Record the engine's launches once; returns how it will be launched, in words."""
        expected = {name: self._on_device[name].clone() for name in self.contract.output_names}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._execute()
        except (RuntimeError, UserError) as error:
            # A loop whose length depends on data cannot be recorded; ordinary launches give the same result.
            return f"no CUDA graph ({str(error).splitlines()[0]})"
        self._graph = graph
        for name in expected:
            self._on_device[name].zero_()
        torch.cuda.synchronize(self._device)
        self._execute()
        self._stream.synchronize()
        if not all(same_results(values, self._on_device[name]) for name, values in expected.items()):
            self._graph = None
            return "no CUDA graph (a replay gave other results)"
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

    @contextmanager
    def _starting(self) -> Iterator[Start]:
        outputs = {name: self._on_device[name] for name in self.contract.output_names}

        def launch() -> dict[str, torch.Tensor]:
            self._execute()
            return outputs

        with InFlight(self._on_device[self.contract.input_name], outputs, launch, self._stream) as flight:

            def start(batch: npt.NDArray[np.generic]) -> Callable[[], Outputs]:
                with self._turn:
                    return partial(self._timed, flight.submit(batch))

            yield start

    def layer_times_ms(self, batch: npt.NDArray[np.generic]) -> dict[str, float]:
        """Milliseconds of each of the engine's layers in an ordinary run on one batch, by TensorRT's profiler."""
        profiler = layer_profiler(self._package)
        self._context.profiler = profiler
        graph, self._graph = self._graph, None  # a replay reports nothing
        try:
            self.run(batch)
        finally:
            self._graph = graph
            self._context.profiler = None
        return dict(profiler.times_ms)


def layer_profiler(package: ModuleType) -> Any:
    """An IProfiler that adds up what it is told, as `times_ms`: layer -> milliseconds."""

    class Profiler(package.IProfiler):  # type: ignore[name-defined, misc]  # of an engine that may be absent
        def __init__(self) -> None:
            super().__init__()
            self.times_ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times_ms[layer_name] = self.times_ms.get(layer_name, 0.0) + ms

    return Profiler()

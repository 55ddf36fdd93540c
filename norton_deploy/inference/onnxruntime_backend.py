"""Exported graphs in ONNX Runtime: CPU, CUDA and TensorRT execution providers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.inference.static_graph import Outputs, StaticGraphPredictor
from norton_deploy.structures import METADATA_KEY

try:
    import onnxruntime
except ImportError as error:
    raise UserError("ONNX Runtime is not installed; pip install 'norton-deploy[export]'") from error

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
TENSOR_TYPES = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}


class OnnxRuntimePredictor(StaticGraphPredictor):
    """A graph in ONNX Runtime, its input and outputs bound to the provider's device.

    Threads on the CPU follow OMP_NUM_THREADS, as torch's do; unset, ONNX Runtime takes all cores. The CUDA
    and TensorRT providers have been run on no GPU by this project's tests; the binding code is the same on
    the CPU.

    Attributes:
        providers: execution providers in order of preference.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        path: Path,
        score_threshold: float | None = None,
        device: str | None = None,
        providers: Sequence[str] | None = None,
        profile_prefix: Path | None = None,
    ) -> None:
        """Open the graph.

        Args:
            path: the `.onnx` file.
            score_threshold: see `load_predictor`.
            device: see `load_predictor`; must agree with `providers` when both are given.
            providers: see `load_predictor`.
            profile_prefix: when given, ONNX Runtime profiles every node; `end_profiling` returns the file.

        Raises:
            UserError: not a graph of this package, its tensors contradict its metadata, or a provider is
                missing or does not start.
        """
        chosen, device_id = choose_providers(device, providers)
        self.providers = chosen
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_prefix)
        with_options = [(name, {} if name == CPU else {"device_id": str(device_id)}) for name in chosen]
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=with_options)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
            raise UserError(f"{path}: ONNX Runtime cannot load it: {' '.join(str(error).split())[:300]}") from error
        started = self._session.get_providers()
        if chosen[0] not in started:
            raise UserError(
                f"{path}: execution provider {chosen[0]} did not start (running: {', '.join(started)}); "
                "is there a GPU with a matching CUDA, cuDNN and TensorRT?"
            )
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise UserError(f"{path}: no '{METADATA_KEY}' metadata; export it with this package")
        super().__init__(str(path), GraphContract.from_json(metadata[METADATA_KEY], str(path)), score_threshold)
        self._check_tensors()
        threads = f"{options.intra_op_num_threads or 'all'} threads"
        self.device = f"ONNX Runtime {onnxruntime.__version__}, {chosen[0]}, {threads}"
        self._device = ("cpu", 0) if chosen[0] == CPU else ("cuda", device_id)
        self._binding = self._session.io_binding()

    def _check_tensors(self) -> None:
        """The graph's tensors must be those that its metadata promises."""
        inputs = self._session.get_inputs()
        contract = self.contract
        found = [(tensor.name, tensor.type, tuple(tensor.shape)) for tensor in inputs]
        expected = (contract.input_name, TENSOR_TYPES[contract.input_dtype], contract.input_shape)
        if found != [expected]:
            raise UserError(f"{self.name}: inputs {found} contradict the metadata {expected}; export it again")
        outputs = {tensor.name for tensor in self._session.get_outputs()}
        missing = [name for name in contract.output_names if name not in outputs]
        if missing:
            raise UserError(f"{self.name}: the graph lacks the outputs {', '.join(missing)}; export it again")

    def _run(self, batch: npt.NDArray[np.generic]) -> Outputs:
        names = self.contract.output_names
        started = time.perf_counter()
        on_device = onnxruntime.OrtValue.ortvalue_from_numpy(batch, *self._device)
        self._binding.bind_ortvalue_input(self.contract.input_name, on_device)
        for name in names:
            self._binding.bind_output(name, *self._device)
        self._binding.synchronize_inputs()
        started = self.timing.add("copy_ms", started)
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        started = self.timing.add("infer_ms", started)
        outputs = {name: value.numpy() for name, value in zip(names, self._binding.get_outputs(), strict=True)}
        self.timing.add("copy_ms", started)
        return outputs

    def end_profiling(self) -> Path:
        """Stop profiling and return the JSON trace; only after `profile_prefix` was given."""
        return Path(self._session.end_profiling())


def choose_providers(device: str | None, providers: Sequence[str] | None) -> tuple[list[str], int]:
    """Execution providers in order of preference, and the index of the GPU that they use.

    Raises:
        UserError: an unknown device, a provider that this ONNX Runtime was not built with, or no GPU.
    """
    available = onnxruntime.get_available_providers()
    kind, _, index = (device or "").partition(":")
    if kind not in ("", "cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"device '{device}': expected cpu, cuda or cuda:N")
    if providers is None:
        if not kind:
            kind = "cuda" if CUDA in available and _cuda_devices() else "cpu"
        providers = [CUDA, CPU] if kind == "cuda" else [CPU]
    elif not providers:
        raise UserError("providers: the list is empty; leave it out or name at least one")
    elif kind and (kind == "cpu") != (providers[0] == CPU):
        raise UserError(f"device '{device}' contradicts providers {list(providers)}; give one of the two")
    missing = [name for name in providers if name not in available]
    if missing:
        raise UserError(
            f"ONNX Runtime has no {', '.join(missing)}; available: {', '.join(available)} "
            "(install the onnxruntime build that has it)"
        )
    device_id = int(index or 0)
    if any(name in (CUDA, TENSORRT) for name in providers):
        if device_id >= _cuda_devices():
            raise UserError(
                f"{providers[0]} on GPU {device_id}: this machine has {_cuda_devices()} CUDA GPU(s) "
                "that work; use device cpu"
            )
        onnxruntime.preload_dlls()  # CUDA and cuDNN from torch's own packages
    return list(providers), device_id


def _cuda_devices() -> int:
    try:
        import torch
    except ImportError:  # a machine that only runs graphs
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0

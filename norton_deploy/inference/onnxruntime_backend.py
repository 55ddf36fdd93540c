"""Exported graphs in ONNX Runtime: CPU and CUDA execution providers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from norton_deploy.cost.session import CPU, CUDA, make_session, onnxruntime
from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.graph_digest import check_digest
from norton_deploy.inference.static_graph import Outputs, StaticGraphPredictor
from norton_deploy.structures import METADATA_KEY

logger = logging.getLogger(__name__)
TENSOR_TYPES = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(bool)": bool}


class OnnxRuntimePredictor(StaticGraphPredictor):
    """A graph in ONNX Runtime, its input and outputs bound once, to buffers on the provider's device.

    Threads on the CPU follow OMP_NUM_THREADS, as torch's do; unset, ONNX Runtime takes all cores. On a GPU a graph of
    standard operators (target "tensorrt") runs as a CUDA graph where all of it can be there. The CUDA provider has
    been run on no GPU by this project's tests; the binding code is the same on the CPU.

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
        *,
        threads: int | None = None,
    ) -> None:
        """Open the graph.

        Args:
            device: see `load_predictor`; must agree with `providers` when both are given.
            profile_prefix: when given, ONNX Runtime profiles every node; `end_profiling` returns the file.

        Raises:
            UserError: not a graph of this package, its tensors contradict its metadata, it was changed since its
                export, or a provider is missing or does not start.
        """
        self._session = make_session(path, device, providers=providers, threads=threads, profile_prefix=profile_prefix)
        self.providers = self._session.get_providers()
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: its metadata is no text ({error}); export it with this package") from error
        if METADATA_KEY not in metadata:
            raise UserError(f"{path}: no '{METADATA_KEY}' metadata; export it with this package")
        check_digest(path)
        super().__init__(str(path), GraphContract.parse(metadata[METADATA_KEY], str(path)), score_threshold)
        self._check_tensors()
        number = self._session.get_session_options().intra_op_num_threads
        used = f"{number or 'all'} thread{'s' * (number != 1)}"
        provider = self.providers[0]
        if provider == CUDA and profile_prefix is None:

            def open_again() -> onnxruntime.InferenceSession:
                return make_session(path, device, providers=providers, cuda_graph=True)

            self._session, used = with_cuda_graph(self._session, self.contract, open_again)
        self.device = f"ONNX Runtime {onnxruntime.__version__}, {provider}, {used}"
        device_id = int(self._session.get_provider_options()[provider].get("device_id", 0))
        self._bind("cpu" if provider == CPU else "cuda", device_id)

    def _bind(self, device: str, device_id: int) -> None:
        """Allocate and bind; a CUDA graph replays addresses."""

        def buffer(shape: Sequence[int], dtype: object) -> onnxruntime.OrtValue:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, device, device_id)

        contract = self.contract
        self._binding = self._session.io_binding()
        self._input = buffer(contract.input_shape, np.dtype(contract.input_dtype).type)
        found = {tensor.name: tensor for tensor in self._session.get_outputs()}
        self._outputs = {
            name: buffer(found[name].shape, NUMPY_TYPES[found[name].type]) for name in contract.output_names
        }
        self._binding.bind_ortvalue_input(contract.input_name, self._input)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def _check_tensors(self) -> None:
        """The graph's tensors must be those that its metadata promises."""
        inputs = self._session.get_inputs()
        contract = self.contract
        found = [(tensor.name, tensor.type, tuple(tensor.shape)) for tensor in inputs]
        expected = (contract.input_name, TENSOR_TYPES[contract.input_dtype], contract.input_shape)
        if found != [expected]:
            raise UserError(f"{self.name}: inputs {found} contradict the metadata {expected}; export it again")
        outputs = {tensor.name: tensor for tensor in self._session.get_outputs()}
        missing = [name for name in contract.output_names if name not in outputs]
        if missing:
            raise UserError(f"{self.name}: the graph lacks the outputs {', '.join(missing)}; export it again")
        for name in contract.output_names:
            kind, shape = outputs[name].type, outputs[name].shape
            if kind not in NUMPY_TYPES or not all(isinstance(side, int) for side in shape):
                raise UserError(f"{self.name}: output '{name}' is {kind} {shape}; fixed shapes are needed")

    def run(self, batch: npt.NDArray[np.generic]) -> Outputs:
        started = time.perf_counter()
        self._input.update_inplace(batch)
        self._binding.synchronize_inputs()
        started = self.timing.add("copy_ms", started)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's own have no common base class
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.name}: ONNX Runtime cannot run this graph ({reason}); are the model's weights finite?"
            ) from error
        self._binding.synchronize_outputs()
        started = self.timing.add("infer_ms", started)
        # Copies: the next results are written to the same memory.
        outputs: Outputs = {name: value.numpy().copy() for name, value in self._outputs.items()}
        self.timing.add("copy_ms", started)
        return outputs

    def end_profiling(self) -> Path:
        """Stop profiling and return the JSON trace; only after `profile_prefix` was given."""
        return Path(self._session.end_profiling())


def with_cuda_graph(
    session: onnxruntime.InferenceSession,
    contract: GraphContract,
    open_again: Callable[[], onnxruntime.InferenceSession],
) -> tuple[onnxruntime.InferenceSession, str]:
    """A session on a GPU with its launches recorded, if they can be; and how it is launched, in words.

    Args:
        open_again: the same with a CUDA graph; raises a UserError where a node would run on the CPU.
    """
    if contract.target != "tensorrt":
        logger.warning(
            "made for target '%s': its NonMaxSuppression waits for the host once for every category; on a GPU a graph "
            "of standard operators is faster (export_onnx --target tensorrt)",
            contract.target,
        )
        return session, "no CUDA graph (NonMaxSuppression)"
    try:
        return open_again(), "CUDA graph"
    except UserError as error:
        return session, f"no CUDA graph ({error})"

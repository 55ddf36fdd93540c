"""Exported graphs in OpenVINO, on the CPU: an `.onnx` file as it is, or OpenVINO's own `.xml` with its `.bin`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.cost.openvino_session import openvino_core, openvino_package, openvino_settings
from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.graph_digest import check_digest
from norton_deploy.inference.predictor import FloatType
from norton_deploy.inference.static_graph import Outputs, StaticGraphPredictor
from norton_deploy.structures import METADATA_KEY

HINT_OF_FLOAT_TYPE: dict[FloatType, str] = {"fp32": "f32", "bf16": "bf16"}
TENSOR_TYPES = {"uint8": "u8", "float32": "f32"}
METADATA_PATH = ["framework", METADATA_KEY]
"""Where OpenVINO keeps an ONNX file's metadata, in memory and in its `.xml`."""


class OpenVinoPredictor(StaticGraphPredictor):
    """A graph in OpenVINO's CPU plugin, compiled for the lowest latency of one call at a time.

    Attributes:
        float_type: the type in which it computes what the graph has in floats.
    """

    backend = "openvino"

    def __init__(
        self,
        path: Path,
        score_threshold: float | None = None,
        device: str | None = None,
        *,
        threads: int | None = None,
        float_type: FloatType = "fp32",
        cache: Path | None = None,
        profile: bool = False,
    ) -> None:
        """Compile the graph.

        Args:
            threads: by default OMP_NUM_THREADS, as torch's and ONNX Runtime's are, or all cores where that is not set.
            float_type: what the graph's floats are computed in. OpenVINO's own choice would be bf16 wherever the CPU
                has it; here it is taken only when asked for.
            cache: folder where OpenVINO keeps what it compiled, so that the next start is quicker.
            profile: whether `profile_ms` works; costs time.

        Raises:
            UserError: OpenVINO is not installed, the file is no graph of this package, its tensors contradict its
                metadata, or the CPU cannot compute in `float_type`.
        """
        openvino, core = openvino_package(), openvino_core()
        if device not in (None, "cpu"):
            raise UserError(f"{path}: device '{device}': the openvino backend runs on the CPU only; use device cpu")
        if float_type not in HINT_OF_FLOAT_TYPE:
            raise UserError(f"{path}: float_type {float_type}: fp32 or bf16 in OpenVINO")
        try:
            settings = openvino_settings(HINT_OF_FLOAT_TYPE[float_type], threads=threads, profile=profile, cache=cache)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        try:
            model = core.read_model(str(path))
            if not model.has_rt_info(METADATA_PATH):
                raise UserError(f"{path}: no '{METADATA_KEY}' metadata; export it with this package")
            if path.suffix == ".onnx":
                check_digest(path)
            contract = GraphContract.parse(model.get_rt_info(METADATA_PATH).astype(str), str(path))
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise UserError(f"{path}: OpenVINO cannot load it: {' '.join(str(error).split())[:300]}") from error
        super().__init__(str(path), contract, score_threshold)
        self._check_tensors(compiled)
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self.float_type = float_type
        version = openvino.__version__.partition("-")[0]
        number = settings.get("INFERENCE_NUM_THREADS", "all")
        self.device = f"OpenVINO {version}, CPU, {float_type}, {number} thread{'s' * (number != 1)}"

    def _check_tensors(self, compiled: Any) -> None:
        """The graph's tensors must be those that its metadata promises."""
        contract = self.contract
        found = [
            (
                # a tensor can have several names: a cast that does nothing is folded into its input
                contract.input_name if contract.input_name in tensor.get_names() else tensor.get_any_name(),
                tensor.element_type.to_string(),
                tensor.partial_shape.to_string(),
            )
            for tensor in compiled.inputs
        ]
        shape = f"[{','.join(map(str, contract.input_shape))}]"
        expected = (contract.input_name, TENSOR_TYPES[contract.input_dtype], shape)
        if found != [expected]:
            raise UserError(f"{self.name}: inputs {found} contradict the metadata {expected}; export it again")
        outputs = {name for tensor in compiled.outputs for name in tensor.get_names()}
        missing = [name for name in contract.output_names if name not in outputs]
        if missing:
            raise UserError(f"{self.name}: the graph lacks the outputs {', '.join(missing)}; export it again")

    def run(self, batch: npt.NDArray[np.generic]) -> Outputs:
        started = time.perf_counter()
        self._request.infer({self.contract.input_name: batch}, share_inputs=True)
        started = self.timing.add("infer_ms", started)
        # Copies: the request writes its next results to the same memory.
        outputs = {name: self._request.get_tensor(name).data.copy() for name in self.contract.output_names}
        self.timing.add("copy_ms", started)
        return outputs

    def profile_ms(self) -> dict[str, float]:
        """Milliseconds of the last call by name of the node, fused ones together; only with `profile`."""
        times_ms: dict[str, float] = {}
        for entry in self._request.get_profiling_info():
            times_ms[entry.node_name] = times_ms.get(entry.node_name, 0.0) + entry.real_time.total_seconds() * 1e3
        return times_ms

    def fused_names(self) -> dict[str, list[str]]:
        """Node that runs -> names of the graph's nodes that it does the work of."""
        fused = {}
        for node in self._compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            original = info["originalLayersNames"].astype(str) if "originalLayersNames" in info else ""
            fused[node.get_friendly_name()] = original.split(",")
        return fused

"""Running an exported graph on the CPU together with the tensors between its stages."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import STAGE_PREFIX

Arrays = dict[str, npt.NDArray[Any]]


def with_stage_outputs(onnx_path: str | Path) -> bytes:
    """The graph with its stage tensors as further outputs."""
    model = onnx.load_model(onnx_path)
    stages = [value for value in model.graph.value_info if value.name.startswith(STAGE_PREFIX)]
    if not stages:
        raise UserError(f"{onnx_path}: its stage tensors are gone; check the file as export_onnx wrote it")
    model.graph.output.extend(stages)
    content: bytes = model.SerializeToString()
    return content


def cpu_session(content: bytes) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, input_name: str, images: npt.NDArray[np.generic]) -> Arrays:
    """All outputs by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {input_name: images}), strict=True))

"""The one way to open a graph in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from norton_deploy.errors import UserError

try:
    import onnxruntime
except ImportError as error:
    raise UserError("ONNX Runtime is not installed; pip install 'norton-deploy[export]'") from error

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"


def make_session(
    model: Path | bytes,
    device: str | None = None,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    profile_prefix: Path | None = None,
    cuda_graph: bool = False,
    cuda_stream: int | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph; whichever provider is asked for first must start.

    Args:
        model: an .onnx file, or its content.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU if there is one.
        providers: execution providers in order of preference; by default that of `device`.
        threads: on the CPU; by default OMP_NUM_THREADS, as torch's are, or all cores where that is not set.
        profile_prefix: when given, ONNX Runtime profiles every node, until `session.end_profiling()` returns the file.
        cuda_graph: record the CUDA provider's launches once; input and outputs must then stay where they are bound.
        cuda_stream: the CUDA provider's stream (a handle), by default one of its own.

    Raises:
        UserError: an unknown device, a provider that is missing or does not start, or no graph.
    """
    chosen, device_id = choose_providers(device, providers)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0")) if threads is None else threads
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    name = "the graph in memory" if isinstance(model, bytes) else str(model)
    content = model if isinstance(model, bytes) else str(model)
    with_options = [(provider, provider_options(provider, device_id, cuda_graph, cuda_stream)) for provider in chosen]
    try:
        session = onnxruntime.InferenceSession(content, options, providers=with_options)
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
        raise UserError(f"{name}: ONNX Runtime cannot load it: {' '.join(str(error).split())[:300]}") from error
    started = session.get_providers()
    if chosen[0] not in started:
        raise UserError(
            f"{name}: execution provider {chosen[0]} did not start (running: {', '.join(started)}); "
            "is there a GPU with a matching CUDA and cuDNN?"
        )
    return session


def provider_options(
    provider: str, device_id: int, cuda_graph: bool = False, cuda_stream: int | None = None
) -> dict[str, str]:
    """What a provider is told. fp32 means fp32: CUDA's own default rounds the factors of products to TF32."""
    if provider != CUDA:
        return {}
    options = {"device_id": str(device_id), "use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}
    return options if cuda_stream is None else options | {"user_compute_stream": str(cuda_stream)}


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
    if TENSORRT in providers:
        raise UserError(
            f"{TENSORRT}: needs TensorRT 10, whatever is installed; build an engine (norton export_trt), or take {CUDA}"
        )
    missing = [name for name in providers if name not in available]
    if missing:
        raise UserError(
            f"ONNX Runtime has no {', '.join(missing)}; available: {', '.join(available)} "
            "(install the onnxruntime build that has it)"
        )
    device_id = int(index or 0)
    if CUDA in providers:
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

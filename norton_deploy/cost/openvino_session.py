"""The one way to have a graph compiled by OpenVINO's CPU plugin."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError


def openvino_settings(
    float_hint: str, *, threads: int | None = None, profile: bool = False, cache: Path | None = None
) -> dict[str, Any]:
    """How OpenVINO's CPU plugin is to compile a graph, for the lowest latency of one call at a time.

    Args:
        float_hint: what floats are computed in, "f32" or "bf16".
        threads: by default OMP_NUM_THREADS, as torch's and ONNX Runtime's are, or all cores where that is not set.
        profile: whether every node is timed.
        cache: folder where OpenVINO keeps what it compiled.

    Raises:
        UserError: the CPU cannot compute in that type.
    """
    if float_hint == "bf16" and "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError("this CPU has no bf16 (lscpu shows neither avx512_bf16 nor amx_bf16); use fp32")
    asked = int(os.environ.get("OMP_NUM_THREADS", "0")) if threads is None else threads
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": float_hint,
        "PERF_COUNT": profile,
    }
    if asked:
        settings["INFERENCE_NUM_THREADS"] = asked
    if cache is not None:
        settings["CACHE_DIR"] = str(cache)
    return settings


@functools.cache
def openvino_core() -> Any:
    """OpenVINO for the life of the process.

    Its CPU plugin gives the thread that compiles first another stack for signal handlers (AMX state needs room) and
    unmaps it when the last user of the plugin goes, in whatever thread that is: the next signal would end the process.
    """
    return openvino_package().Core()


def openvino_package() -> Any:
    """
    Raises:
        UserError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError("OpenVINO is not installed; pip install 'norton-deploy[openvino]'") from error
    return openvino

"""norton export_trt: a detector as a TensorRT or TensorRT-RTX engine, by way of a checked ONNX file.

TensorRT-RTX builds on any machine, without a GPU. Where the engine cannot be built, the ONNX file is written, the
commands that finish on the target are printed, and the exit status is 3.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.commands import write_json
from norton_deploy.commands.export_onnx import ExportSettings, export_checked
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError
from norton_deploy.export.tensorrt_build import Engine, EngineUnavailableError, build_engine, target_commands
from norton_deploy.files import check_output_file

ENGINE_NOT_BUILT = 3


@dataclass(kw_only=True)
class Settings(ExportSettings):
    """Settings of export_trt."""

    engine: Engine = "tensorrt-rtx"
    """tensorrt-rtx (built here, GPU or not) or tensorrt (built on the GPU that runs it)."""
    compute_capability: str | None = None
    """Of the target GPU, 86 for an RTX 3060; by default portable (tensorrt-rtx) or this GPU's (tensorrt)."""
    onnx: Path | None = None
    """Build from this ONNX file (target tensorrt) instead of exporting a model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export, compare, build, report."""
    settings = parse_settings(Settings, argv, prog="export_trt", description=__doc__ or "")
    check_output_file(settings.out, "--out", ".engine")
    check_output_file(settings.json, "--json")
    report: dict[str, Any] = {}
    if settings.onnx is not None:
        if settings.model is not None or settings.plan is not None:
            raise UserError("--onnx: give either a graph or a model, not both")
        graph = settings.onnx
    else:
        graph = settings.out.with_suffix(".onnx")
        report = export_checked(settings, "tensorrt", graph)
    started = time.perf_counter()
    try:
        manifest = build_engine(
            graph, settings.out, engine=settings.engine, compute_capability=settings.compute_capability
        )
    except EngineUnavailableError as error:
        commands = target_commands(graph, settings.out, settings.engine)
        print(f"{settings.out}: not built, {error}", file=sys.stderr)
        print(f"{graph} is ready; on the target run the first (the second only to time the engine):", file=sys.stderr)
        print("\n".join(f"  {command}" for command in commands), file=sys.stderr)
        write_json(report | {"engine": None, "reason": str(error), "target_commands": commands}, settings.json)
        return ENGINE_NOT_BUILT
    build_s = time.perf_counter() - started
    print(
        f"{settings.out}: {settings.engine} {manifest['engine_version']} for compute capability "
        f"{manifest['compute_capability']}, built in {build_s:.0f} s; not run here",
        file=sys.stderr,
    )
    write_json(report | {"engine": str(settings.out), "manifest": manifest, "build_s": build_s}, settings.json)
    return 0

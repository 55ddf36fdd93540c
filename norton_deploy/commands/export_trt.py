"""norton export_trt: a detector as a TensorRT or TensorRT-RTX engine, by way of a checked ONNX file.

TensorRT-RTX builds on any machine, without a GPU. Where the engine cannot be built, the ONNX file is written, the
commands that finish on the target are printed, and the exit status is 3.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Suppress

from norton_deploy.commands import export_onnx, write_json
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.export.artefact import check_artefact_folder, write_artefact
from norton_deploy.export.contract import Target
from norton_deploy.export.tensorrt_build import Engine, build_or_explain, manifest_path
from norton_deploy.files import check_output_file
from norton_deploy.parity.engine_check import check_engine

ENGINE_NOT_BUILT = 3
FIRST = (
    "model",
    "categories",
    "image-size",
    "input-size",
    "precision",
    "calibration",
    "engine",
    "compute-capability",
    "images",
    "artefact",
    "overwrite",
)


@dataclass(frozen=True, kw_only=True)
class Settings(export_onnx.Settings):
    """Settings of export_trt."""

    target: Suppress[Target] = "tensorrt"
    engine: Engine = "tensorrt-rtx"
    """tensorrt-rtx (built here, GPU or not) or tensorrt (built on the GPU that runs it)."""
    compute_capability: str | None = None
    """Of the target GPU, 86 for an RTX 3060; by default portable (tensorrt-rtx) or this GPU's (tensorrt)."""
    onnx: Path | None = None
    """Build from this ONNX file (target tensorrt) instead of exporting a model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export, compare, build, report."""
    settings = parse_settings(Settings, argv, prog="export_trt", description=__doc__ or "")
    check_output_file(settings.out, "--out", ".engine", overwrite=settings.overwrite)
    check_output_file(manifest_path(settings.out), "--out", overwrite=settings.overwrite)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    if settings.onnx is not None and (settings.model is not None or settings.plan is not None):
        raise UserError("--onnx: give either a graph or a model, not both")
    if settings.artefact is not None:
        check_artefact_folder(settings.artefact, overwrite=settings.overwrite)
    graph, report = settings.onnx, dict[str, Any]()
    if graph is None:
        graph = settings.out.with_suffix(".onnx")
        report = export_onnx.run_export(replace(settings, target="tensorrt"), graph).to_dict()
    built = build_or_explain(
        graph, settings.out, engine=settings.engine, compute_capability=settings.compute_capability
    )
    build = check_engine(built, report=lambda message: print(message, file=sys.stderr))
    print(build.text(), file=sys.stderr)
    if settings.eval is not None and build.manifest is not None and build.manifest.ran:
        found = evaluate_file(settings.out, settings.eval, build.manifest.contract.task, limit=settings.eval_limit)
        report["engine_evaluation"] = found.to_dict()
    if settings.artefact is not None:
        model = graph if build.manifest is None else settings.out
        write_artefact(settings.artefact, model, overwrite=settings.overwrite)
    write_json(report | build.to_dict(), settings.json)
    return 0 if build.manifest is not None else ENGINE_NOT_BUILT

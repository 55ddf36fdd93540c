"""norton export_torch: a detector compiled by torch itself (AOTInductor) for a CPU or a GPU of this machine.

It goes by way of a checked ONNX file, as export_trt does; the package then runs here and is compared with what eager
mode found. Compiling takes minutes and needs a C++ compiler. `load_predictor("model.pt2")` loads it.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Suppress

from norton_deploy.commands import export_onnx, write_json
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError
from norton_deploy.export.contract import Target
from norton_deploy.export.static_roi_align import fix_sampling
from norton_deploy.export.tensorrt_build import manifest_path
from norton_deploy.export.torch_package import build_package
from norton_deploy.files import check_output_file
from norton_deploy.inference.torch_backend import choose_device, full_precision
from norton_deploy.parity.engine_check import check_engine
from norton_deploy.parity.export_checked import static_detector

FIRST = ("model", "categories", "image-size", "precision", "device", "images", "overwrite")


@dataclass(frozen=True, kw_only=True)
class Settings(export_onnx.Settings):
    """Settings of export_torch."""

    target: Suppress[Target] = "tensorrt"
    artefact: Suppress[Path | None] = None
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU if there is one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export, compare, compile, compare."""
    settings = parse_settings(Settings, argv, prog="export_torch", description=__doc__ or "")
    check_output_file(settings.out, "--out", ".pt2", overwrite=settings.overwrite)
    check_output_file(manifest_path(settings.out), "--out", overwrite=settings.overwrite)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    if settings.precision == "int8":
        raise UserError("--precision int8: torch compiles fp32, fp16 and tf32; int8 is for export_onnx and export_trt")
    device = choose_device(settings.device)
    graph = settings.out.with_suffix(".onnx")
    export = export_onnx.run_export(settings, graph)
    model = fix_sampling(export_onnx.open_model_of(settings)[0])
    static = static_detector(model, settings, export.contract.image_size)
    with nullcontext() if settings.precision == "tf32" else full_precision():  # kernels are compiled for one of the two
        built = build_package(static, graph, settings.out, device)
    build = check_engine(built, report=lambda message: print(message, file=sys.stderr))
    print(build.text(), file=sys.stderr)
    write_json(export.to_dict() | build.to_dict(), settings.json)
    return 0

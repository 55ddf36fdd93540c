"""AOTInductor packages (.pt2): a static detector that torch compiled ahead of time, for a CPU or for one kind of GPU.

For GPUs without TensorRT, and for those that TensorRT-RTX does not support (all data-centre cards). A package is native
code of this torch version; loading it runs it, so take packages only from whom you would take a program.
"""

from __future__ import annotations

import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import quiet, read_contract
from norton_deploy.export.static_rcnn import StaticRCNN
from norton_deploy.export.tensorrt_build import CPU_ENGINE, EngineBuild, EngineManifest, local_capability
from norton_deploy.files import atomic_write, sha256_of


def build_package(detector: StaticRCNN, graph: Path, out: Path, device: torch.device) -> EngineBuild:
    """Compile a detector and write the package, and its manifest, whole or not at all. Minutes.

    Args:
        detector: the one that `graph` was exported from.
        graph: the checked .onnx file of standard operators (target "tensorrt"); the package gets its contract.
        device: that the package is for: the CPU, or a GPU of this machine.

    Raises:
        UserError: torch cannot compile it, for want of a C++ compiler for instance.
    """
    contract = read_contract(graph)
    started = time.perf_counter()
    example = torch.zeros(contract.input_shape, dtype=getattr(torch, contract.input_dtype), device=device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, quiet("torch._inductor"):
        program = torch.export.export(detector.to(device), (example,), strict=False)
        try:
            made = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        except Exception as error:  # of the compiler, of Triton, of torch: no common base class
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{out}: torch {torch.__version__} cannot compile it for {device}: {reason}") from error
        with atomic_write(out) as stream:
            stream.write(Path(made).read_bytes())
    manifest = EngineManifest(
        engine="aotinductor",
        engine_version=torch.__version__,
        compute_capability=CPU_ENGINE if device.type == "cpu" else local_capability(),
        norton_deploy_version=version("norton-deploy"),
        graph_sha256=sha256_of(graph),
        engine_sha256=sha256_of(out),
        contract=contract,
    )
    manifest.write(out)
    return EngineBuild(graph, out, "aotinductor", manifest, build_s=time.perf_counter() - started)

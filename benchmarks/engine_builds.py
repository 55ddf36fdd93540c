"""How long a detector takes to become an engine: export, comparison with eager mode, TensorRT-RTX build.

Box, mask and keypoint, dense and by each plan, fp32 and fp16, built ahead of time for one compute capability on a
machine without a GPU. The engines are not run. Weights are random. A cell that is in the results file is not run again.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.commands import export_trt, write_json
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import Precision
from norton_deploy.files import atomic_write
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.structures import TASKS, Task

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/engine_builds.py."""

    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    plans: tuple[Path, ...] = (Path("configs/plans/table3.yaml"), Path("configs/plans/fast.yaml"))
    """Compressed detectors, beside the dense one."""
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    """Precisions."""
    image_size: tuple[int, int] = (800, 800)
    """Height and width of the graphs."""
    compute_capability: str = "86"
    """Of the GPU that the engines are for; 86 is an RTX 3060."""
    parity_images: int = 1
    """Images on which each graph is compared with eager mode."""
    out: Path = RESULTS / "engine_builds.json"
    """Results file; a Markdown table is written beside it."""


def main() -> int:
    """Run the benchmark; status 1 when a graph failed its comparison or an engine was not built."""
    settings = parse_settings(Settings, prog="engine_builds", description=__doc__ or "")
    results: dict[str, Any] = json.loads(settings.out.read_text()) if settings.out.is_file() else {"cells": {}}
    for name, arguments in _cells(settings).items():
        if name in results["cells"]:
            continue
        print(f"== {name}", file=sys.stderr)
        results["cells"][name] = {**_build(arguments, settings), "provenance": provenance()}
        write_json(results, settings.out)
        with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
            stream.write(_table(results).to_markdown() + "\n")
    return int(any("failure" in cell for cell in results["cells"].values()))


def _cells(settings: Settings) -> dict[str, list[str]]:
    cells = {}
    for task in settings.tasks:
        for plan in (None, *settings.plans):
            for precision in settings.precisions:
                model = [] if plan is None else ["--plan", str(plan)]
                name = f"{task}, {'dense' if plan is None else plan.stem}, {precision}"
                cells[name] = ["--task", task, *model, "--precision", precision]
    return cells


def _build(arguments: list[str], settings: Settings) -> dict[str, Any]:
    height, width = settings.image_size
    with tempfile.TemporaryDirectory() as folder:
        engine, report_file = Path(folder) / "detector.engine", Path(folder) / "report.json"
        argv = [*arguments, "--engine", "tensorrt-rtx", "--compute-capability", settings.compute_capability]
        argv += ["--image-size", str(height), str(width), "--parity-images", str(settings.parity_images)]
        started = time.perf_counter()
        try:
            status = export_trt.main([*argv, "--out", str(engine), "--json", str(report_file)])
        except UserError as error:
            return {"failure": str(error).replace(f"{folder}/", "")}
        total_s = time.perf_counter() - started
        report = json.loads(report_file.read_text())
        if status != 0:
            return {"failure": report["reason"]}
        return {
            "total_s": total_s,
            **{key: report[key] for key in ("export_s", "parity_s", "build_s")},
            "engine_version": report["manifest"]["engine_version"],
            "compute_capability": report["manifest"]["compute_capability"],
            "engine_mib": engine.stat().st_size / 2**20,
            "detections": report["parity"]["detections"],
            "stages": report["parity"]["stages"],
        }


def _table(results: dict[str, Any]) -> Table:
    rows = []
    for name, cell in results["cells"].items():
        if "failure" in cell:
            rows.append((name, cell["failure"].splitlines()[0], *["-"] * 5))
            continue
        seconds = (f"{cell[key]:.0f}" for key in ("export_s", "parity_s", "build_s", "total_s"))
        rows.append((name, f"built for {cell['compute_capability']}", *seconds, f"{cell['engine_mib']:.0f}"))
    header = ("Detector", "Engine", "Export s", "Comparison s", "Build s", "All s", "Engine MiB")
    return Table(header, tuple(rows), "TensorRT-RTX engines, built ahead of time without a GPU and not run")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

"""How long a detector takes to become an engine: export, comparison with eager mode, TensorRT-RTX build.

Box, mask and keypoint, dense and by each plan, fp32 and fp16, built ahead of time for one compute capability on a
machine without a GPU. The engines are not run. Weights are random. A cell that is in the results file is not run again.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.cells import PLANS, RESULTS, ResultCells, run, settings_of, tabulate
from norton_deploy.errors import UserError
from norton_deploy.export.contract import Precision
from norton_deploy.export.tensorrt_build import build_or_explain
from norton_deploy.parity.checked_quantisation import SYNTHETIC
from norton_deploy.parity.export_checked import ExportOptions, export_checked, open_detector
from norton_deploy.structures import TASKS, Task

CALIBRATION = 16
"""Drawn scenes that int8 takes its ranges from."""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/engine_builds.py."""

    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    plans: tuple[Path, ...] = (PLANS / "table3.yaml", PLANS / "fast.yaml")
    """Compressed detectors, beside the dense one."""
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    """Precisions; int8 too."""
    image_size: tuple[int, int] = (800, 800)
    """Height and width of the graphs."""
    compute_capability: str = "86"
    """Of the GPU that the engines are for; 86 is an RTX 3060."""
    others: tuple[str, ...] = ()
    """More compute capabilities to build for, from the same graph."""
    parity_images: int = 1
    """Images on which each graph is compared with eager mode."""
    out: Path = RESULTS / "engine_builds.json"
    """Results file; a Markdown table is written beside it."""


def main(settings: Settings) -> int:
    """Build what is missing; status 1 when a graph failed its comparison or an engine was not built."""
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        f"{task}, {'dense' if plan is None else plan.stem}, {precision}": partial(
            build, task, plan, precision, settings
        )
        for task in settings.tasks
        for plan in (None, *settings.plans)
        for precision in settings.precisions
    }
    key = settings_of(settings, "tasks", "plans", "precisions", "others")
    return ResultCells(settings.out, key, report).measure_all(cells)


def build(task: Task, plan: Path | None, precision: Precision, settings: Settings) -> dict[str, Any]:
    """One cell: what the export and the build took, or why there is no engine."""
    options = ExportOptions(
        image_size=settings.image_size, precision=precision, target="tensorrt",
        calibration=SYNTHETIC, calibration_images=CALIBRATION,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "detector.engine"
        started = time.perf_counter()
        try:
            model, _, categories = open_detector(None, task, plan=plan, image_size=settings.image_size)
            export = export_checked(
                model, task, categories, engine.with_suffix(".onnx"), options,
                scenes=settings.parity_images, report=partial(print, file=sys.stderr),
            )  # fmt: skip
            built = build_or_explain(export.file, engine, compute_capability=settings.compute_capability)
        except UserError as error:
            return {"failure": str(error).replace(f"{folder}/", "")}
        if built.manifest is None:
            return {"failure": built.reason}
        total_s = time.perf_counter() - started
        others = {}
        for capability in settings.others:
            file = engine.with_name(f"{capability}.engine")
            other = build_or_explain(export.file, file, compute_capability=capability)
            if other.manifest is None:
                return {"failure": other.reason}
            others[capability] = {"build_s": other.build_s, "engine_mib": file.stat().st_size / 2**20}
        return {
            "total_s": total_s,
            "export_s": export.export_s,
            "parity_s": export.parity_s,
            "build_s": built.build_s,
            "engine_version": built.manifest.engine_version,
            "compute_capability": built.manifest.compute_capability,
            "engine_mib": engine.stat().st_size / 2**20,
            "others": others,
            "detections": export.parity.detections,
            "stages": export.parity.to_dict()["stages"],
        }


def report(results: ResultCells) -> str:
    """One row a cell."""

    def figure(name: str) -> Callable[[tuple[str, Mapping[str, Any]]], str]:
        return lambda row: f"{row[1][name]:.0f}" if name in row[1] else "-"

    def outcome(row: tuple[str, Mapping[str, Any]]) -> str:
        cell = row[1]
        if "failure" in cell:
            return str(cell["failure"]).splitlines()[0]
        return f"built for {' and '.join((cell['compute_capability'], *cell.get('others', ())))}"

    return tabulate(
        "TensorRT-RTX engines, built ahead of time without a GPU and not run",
        results.cells.items(),
        {
            "Detector": lambda row: row[0],
            "Engine": outcome,
            "Export s": figure("export_s"),
            "Comparison s": figure("parity_s"),
            "Build s": figure("build_s"),
            "All s": figure("total_s"),
            "Engine MiB": figure("engine_mib"),
        },
    ).to_markdown()


if __name__ == "__main__":
    run(Settings, main)

"""Why a compressed detector stays below the machine's matrix-multiply rate: its time by kind of operator.

ONNX Runtime's profiler times every node of the dense and of one compressed detector, both in their fastest forms.
Convolutions and matrix products are told apart by their shapes: dense ones (1x1 and full convolutions, linear layers),
grouped ones (a few inputs for each output, so that memory and not arithmetic is the limit), and everything that has no
multiply-accumulates that count: gathers of RoIAlign, TopK, NMS, layout changes, element-wise work. Weights are random.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.cells import RESULTS, Cell, ResultCells, page, run, settings_of, tabulate
from benchmarks.lib.random_detectors import RandomDetectors, WorkSettings, sgemm_gmacs_per_s, timing_table
from benchmarks.lib.stages import EVENT_SUFFIX
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.reporting.report import Table
from norton_deploy.search.latency_budget import export_tuned
from norton_deploy.structures import TASKS, Task

MATRIX, GROUPED = "dense convolutions and matrix products", "grouped convolutions"
FEW_INPUTS = 8
"""Inputs of one output up to which a convolution counts as grouped."""


@dataclass(frozen=True, kw_only=True)
class Settings(WorkSettings):
    """Settings of benchmarks/operator_profile.py."""

    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    plan: str = "fast"
    """Plan of configs/plans, beside the dense model."""
    rounds: int = 6
    """Calls of each model."""
    warm_up: int = 1
    """Calls before that; they count too."""
    out: Path = RESULTS / "operator_profile.json"
    """Results file; a Markdown table is written beside it."""
    work: Path = Path("runs/operator_profile")
    """Folder for exported graphs, prepared images and layer times."""


def main(settings: Settings) -> int:
    """Profile what is missing and write the results."""
    results = ResultCells(settings.out, settings_of(settings, "tasks"), report)
    return results.measure_all({task: partial(profile_task, task, settings) for task in settings.tasks})


def profile_task(task: Task, settings: Settings) -> dict[str, Any]:
    """The sgemm rate, and model -> kind of operator -> ms and MACs of one image."""
    rate = float(np.median(sgemm_gmacs_per_s()))
    images, _ = settings.prepare_images(settings.work)
    models, found, calls = RandomDetectors(), {}, settings.warm_up + settings.rounds
    for name in ("dense", settings.plan):
        model, categories = models.get(task, name, settings, images)
        file = settings.work / f"profile_{name}.onnx"
        export_tuned(model, settings.workload, categories, timing_table(settings.work), file)
        predictor = OnnxRuntimePredictor(file, profile_prefix=settings.work / "profile")
        for step in range(calls):
            predictor.predict_files([images[step % len(images)]])
        profile = predictor.end_profiling()
        found[name] = by_kind(json.loads(profile.read_text()), calls)
        profile.unlink()
        file.unlink()
    return {"sgemm_gmacs_per_s": rate, "models": found}


def by_kind(events: Sequence[dict[str, Any]], calls: int) -> dict[str, dict[str, float]]:
    """Mean ms and MACs per call of each kind of operator, from a profile's node events."""
    kinds: dict[str, dict[str, float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(EVENT_SUFFIX):
            kind, macs = classify(event["args"])
            entry = kinds.setdefault(kind, {"ms": 0.0, "macs": 0.0})
            entry["ms"] += event["dur"] / 1e3 / calls
            entry["macs"] += macs / calls
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"]))


def classify(arguments: dict[str, Any]) -> tuple[str, int]:
    """Kind of an executed node and its multiply-accumulates, from the profiler's arguments."""
    operator = str(arguments["op_name"])
    inputs, outputs = (
        [next(iter(entry.values())) for entry in arguments[key]] for key in ("input_type_shape", "output_type_shape")
    )
    if operator.endswith("Conv"):
        per_output = int(np.prod(inputs[1][1:]))
        kind = GROUPED if inputs[1][1] <= FEW_INPUTS < inputs[0][1] else MATRIX
        return kind, int(np.prod(outputs[0])) * per_output
    if operator == "ConvTranspose":
        return MATRIX, int(np.prod(inputs[0])) * int(np.prod(inputs[1][1:]))
    if operator in ("MatMul", "FusedMatMul", "Gemm", "FusedGemm"):
        return MATRIX, int(np.prod(outputs[0])) * inputs[0][-1]
    return operator, 0


def report(results: ResultCells) -> str:
    """One table a task."""
    return page(*(operator_table(task, cell) for task, cell in results.cells.items()))


def operator_table(task: str, cell: Cell) -> Table:
    """Kinds of operators of both models; those below 1 % of a model's time are one row."""
    rows: list[tuple[str, str, float, float, float]] = []  # model, kind, ms, share of the time, MACs
    for name, kinds in cell["models"].items():
        total_ms = sum(entry["ms"] for entry in kinds.values())
        shown = {kind: entry for kind, entry in kinds.items() if entry["ms"] >= 0.01 * total_ms}
        rest_ms = total_ms - sum(entry["ms"] for entry in shown.values())
        for kind, entry in {**shown, "others": {"ms": rest_ms, "macs": 0}}.items():
            rows.append((name, kind, entry["ms"], entry["ms"] / total_ms, entry["macs"]))
    sgemm = cell["sgemm_gmacs_per_s"]
    return tabulate(
        f"{task}: nodes of one image; sgemm {sgemm:.0f} GMAC/s",
        rows,
        {
            "Model": lambda row: row[0],
            "Operators": lambda row: row[1],
            "ms": lambda row: f"{row[2]:.1f}",
            "Share of the time": lambda row: f"{100 * row[3]:.0f} %",
            "MACs": lambda row: f"{row[4] / 1e9:.1f}G",
            "Of the sgemm rate": lambda row: f"{100 * row[4] / row[2] / 1e6 / sgemm:.0f} %" if row[4] else "-",
        },
    )


if __name__ == "__main__":
    run(Settings, main)

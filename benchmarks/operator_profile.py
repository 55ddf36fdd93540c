"""Why a compressed detector stays below the machine's matrix-multiply rate: its time by kind of operator.

ONNX Runtime's profiler times every node of the dense and of one compressed detector, both in their fastest forms.
Convolutions and matrix products are told apart by their shapes: dense ones (1x1 and full convolutions, linear layers),
grouped ones (a few inputs for each output, so that memory and not arithmetic is the limit), and everything that has no
multiply-accumulates that count: gathers of RoIAlign, TopK, NMS, layout changes, element-wise work. Weights are random.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import whole_detector as whole

from norton_deploy import commands
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.search.end_to_end import export_tuned
from norton_deploy.structures import TASKS, Task

MATRIX, GROUPED = "dense convolutions and matrix products", "grouped convolutions"
FEW_INPUTS = 8
"""Inputs of one output up to which a convolution counts as grouped."""


@dataclass
class Settings(whole.Settings):
    """Settings of the benchmark; see whole_detector.py for those that it shares."""

    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    plan: str = "fast"
    """Plan of configs/plans, beside the dense model."""
    out: Path = whole.ROOT / "results" / "operator_profile.json"
    """Results file; a Markdown table is written beside it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and write the results."""
    settings = parse_settings(Settings, argv, prog="operator_profile", description=__doc__ or "")
    settings = replace(settings, plans=(settings.plan,))
    settings.work.mkdir(parents=True, exist_ok=True)
    rate = float(np.median(whole.sgemm_gmacs_per_s()))
    cells = {task: profile_task(task, settings) for task in settings.tasks}
    results = {"sgemm_gmacs_per_s": rate, "cells": cells, "provenance": provenance()}
    commands.write_json(results, settings.out)
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write("\n\n".join(table(task, results).to_markdown() for task in cells) + "\n")
    return 0


def profile_task(task: Task, settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> kind of operator -> ms and MACs of one image."""
    images, _ = whole.prepare(settings)
    models, categories = whole.build_models(task, ("dense", settings.plan), settings, images)
    found = {}
    for name, model in models.items():
        file = settings.work / f"profile_{name}.onnx"
        export_tuned(model, whole.workload(settings), categories, whole.timing_table(settings), file)
        predictor = OnnxRuntimePredictor(file, profile_prefix=settings.work / "profile")
        for step in range(settings.warm_up + settings.rounds):
            predictor.predict_files([images[step % len(images)]])
        report = predictor.end_profiling()
        found[name] = by_kind(json.loads(report.read_text()), settings.warm_up + settings.rounds)
        report.unlink()
        file.unlink()
    return found


def by_kind(events: Sequence[dict[str, Any]], calls: int) -> dict[str, dict[str, float]]:
    """Mean ms and MACs per call of each kind of operator, from a profile's node events."""
    kinds: dict[str, dict[str, float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
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


def table(task: str, results: dict[str, Any]) -> Table:
    """Kinds of operators of both models; those below 1 % of a model's time are one row."""
    rows = []
    for name, kinds in results["cells"][task].items():
        total_ms = sum(entry["ms"] for entry in kinds.values())
        shown = {kind: entry for kind, entry in kinds.items() if entry["ms"] >= 0.01 * total_ms}
        rest_ms = total_ms - sum(entry["ms"] for entry in shown.values())
        for kind, entry in {**shown, "others": {"ms": rest_ms, "macs": 0}}.items():
            rate = entry["macs"] / entry["ms"] / 1e6 / results["sgemm_gmacs_per_s"] if entry["macs"] else None
            share, macs = f"{100 * entry['ms'] / total_ms:.0f} %", f"{entry['macs'] / 1e9:.1f}G"
            rows.append((name, kind, f"{entry['ms']:.1f}", share, macs, "-" if rate is None else f"{100 * rate:.0f} %"))
    header = ("Model", "Operators", "ms", "Share of the time", "MACs", "Of the sgemm rate")
    return Table(header, tuple(rows), f"{task}: nodes of one image; sgemm {results['sgemm_gmacs_per_s']:.0f} GMAC/s")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

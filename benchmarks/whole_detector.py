"""Whole-detector plans end to end: dense, table3, balanced and fast, in torch eager and in ONNX Runtime.

For each task all models run in turn on the same images with the same numbers of proposals and detections (score
threshold 0). Further cells show how latency grows with image size, detections and batch, dense beside fast. Every
graph has its CPDBlocks in the forms that were measured fastest on this machine. Beside each latency stands the
share of the machine's own matrix-multiply rate (sgemm, measured in the same run) that its MACs per second reach.

Weights are random, with normalisation calibrated on the images: enough for time, MACs and parameters, and nothing
is said about AP. A finished cell is written at once; running again does only what is missing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.cells import RESULTS, ResultCells, run, settings_of
from benchmarks.lib.random_detectors import RandomDetectors, WorkSettings, sgemm_gmacs_per_s, timing_table
from benchmarks.lib.whole_detector_report import EAGER, ONNX, report
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.data.image_file import read_image
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.predictor import Predictor
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.reporting.latency import measure_alternating
from norton_deploy.search.latency_budget import export_tuned
from norton_deploy.structures import TASKS, Task


@dataclass(frozen=True, kw_only=True)
class Settings(WorkSettings):
    """Settings of benchmarks/whole_detector.py."""

    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    plans: tuple[str, ...] = ("table3", "balanced", "fast")
    """Plans of configs/plans, beside the dense model; the last one is also scaled."""
    rounds: int = 6
    """Measured calls of each model."""
    warm_up: int = 1
    """Calls before measuring."""
    sizes: tuple[int, ...] = (320, 480, 640, 800, 1024)
    """Image sides of the scaling cells (task box)."""
    detection_counts: tuple[int, ...] = (1, 25, 50, 100)
    """Detections of the scaling cells (task keypoint)."""
    batches: tuple[int, ...] = (1, 2, 4)
    """Batches of the scaling cells (task box)."""
    out: Path = RESULTS / "whole_detector.json"
    """Results; a .md, an .html and two .png are written beside it."""
    work: Path = Path("runs/whole_detector")
    """Folder for exported graphs, prepared images and layer times."""


def main(settings: Settings) -> int:
    """Measure what is missing and write the results."""
    key = settings_of(settings, "tasks", "sizes", "detection_counts", "batches")
    models = RandomDetectors()
    cells: dict[str, Callable[[], dict[str, Any]]] = {}
    for task in settings.tasks:
        cells[task] = partial(measure_task, task, settings, models)
    for side in settings.sizes:
        changed = replace(settings, image_size=(side, side))
        cells[f"image side {side}"] = partial(measure_scaling, "box", changed, models)
    for count in settings.detection_counts:
        changed = replace(settings, detections=count)
        cells[f"detections {count}"] = partial(measure_scaling, "keypoint", changed, models)
    for batch in settings.batches:
        cells[f"batch {batch}"] = partial(measure_scaling, "box", settings, models, batch)
    return ResultCells(settings.out, key, report).measure_all(cells)


def measure_task(task: Task, settings: Settings, models: RandomDetectors) -> dict[str, Any]:
    """Every plan in both engines, all in turn."""
    images, images_are = settings.prepare_images(settings.work)
    predictors: dict[str, Predictor] = {}
    forms, complexity = {}, {}
    for name in ("dense", *settings.plans):
        model, categories = models.get(task, name, settings, images)
        predictors[f"{name}, {EAGER}"] = TorchPredictor(copy.deepcopy(model), task, categories)
        file = settings.work / f"{task}_{name}.onnx"
        print(f"{task}: exporting {name}", file=sys.stderr)
        forms[name] = export_tuned(model, settings.workload, categories, timing_table(settings.work), file)
        predictors[f"{name}, {ONNX}"] = OnnxRuntimePredictor(file)
        file.unlink()
        counted = settings.complexity(model)
        complexity[name] = {"macs": counted.macs, "params": counted.params}
    before = sgemm_gmacs_per_s()
    ledger = measure_alternating(predictors, images, rounds=settings.rounds, warm_up=settings.warm_up)
    rate = float(np.median(before + sgemm_gmacs_per_s()))
    latency = {}
    for name in predictors:
        summary = ledger.summary(name).to_dict()
        done = complexity[name.partition(",")[0]]["macs"] / summary["p50_ms"] / 1e6
        latency[name] = {**summary, "gmacs_per_s": done, "sgemm_share": done / rate}
    return {
        "images": images_are,
        "sgemm_gmacs_per_s": rate,
        "complexity": complexity,
        "latency": latency,
        "forms": {name: sorted(set(found.values())) for name, found in forms.items()},
        "total_ms": ledger.to_dict(),
        "speedup": [
            {"baseline": baseline, "candidate": name, **ledger.speedup(baseline, name).to_dict()}
            for baseline in (f"dense, {EAGER}", f"dense, {ONNX}")
            for name in predictors
            if name.endswith(ONNX) and name != baseline
        ],
    }


def measure_scaling(task: Task, settings: Settings, models: RandomDetectors, batch: int = 1) -> dict[str, Any]:
    """Dense and the last plan in ONNX Runtime at one size, number of detections and batch; ms per image."""
    images, _ = settings.prepare_images(settings.work)
    pixels = [read_image(path) for path in images]
    calls: dict[str, Callable[[int], Any]] = {}
    for name in ("dense", settings.plans[-1]):
        model, categories = models.get(task, name, settings, images)
        file = settings.work / f"scaled_{name}.onnx"
        workload = replace(settings.workload, batch=batch)
        export_tuned(model, workload, categories, timing_table(settings.work), file)
        calls[name] = partial(call_batch, OnnxRuntimePredictor(file), pixels, batch)
        file.unlink()
    turns = time_in_turns(calls, rounds=settings.rounds, warm_up=settings.warm_up)
    return {
        "p50_ms": {name: float(np.median(turns.of(name))) / batch for name in calls},
        "times_ms": {name: (turns.of(name) / batch).tolist() for name in calls},
    }


def call_batch(predictor: Predictor, pixels: list[Any], batch: int, step: int) -> None:
    """The images of one round."""
    predictor([pixels[(step * batch + index) % len(pixels)] for index in range(batch)])


if __name__ == "__main__":
    run(Settings, main)

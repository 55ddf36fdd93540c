"""The paper's Table III on this machine: dense, NORTON and the authors' own block, eager and in ONNX Runtime.

For each task six models run in turn on the same images: torchvision's dense detector (torch eager, and
exported to ONNX Runtime), NORTON by configs/plans/table3.yaml (both ways, CPDBlocks in their grouped form), and the
same NORTON weights with the authors' three-convolution block (both ways).

Without --model and --baseline the weights are random, with normalisation statistics calibrated on the images
so that activations keep their scale: that is enough for time, MACs and parameters, and says nothing about AP.
Every model gets 1000 proposals and keeps 100 detections (score threshold 0), so that all do equal work.

A finished task is written at once; running again does only what is missing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.lib.cells import PLANS, RESULTS, ResultCells, run, settings_of
from benchmarks.lib.random_detectors import WorkSettings
from benchmarks.lib.stages import macs_ceiling, split_stages, stage_macs
from benchmarks.lib.table3_report import (
    AUTHORS_EAGER,
    AUTHORS_ORT,
    DENSE_EAGER,
    DENSE_ORT,
    NORTON_EAGER,
    NORTON_ORT,
    report,
)
from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.compression.lowering import Form, lower_model
from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import export_onnx
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import BackboneSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.latency import measure_alternating
from norton_deploy.structures import TASKS, Categories, Task

SPLIT_CALLS = 3
COMPARISONS = ((DENSE_EAGER, NORTON_ORT), (DENSE_EAGER, NORTON_EAGER), (AUTHORS_EAGER, NORTON_EAGER),
               (DENSE_ORT, NORTON_ORT), (DENSE_ORT, AUTHORS_ORT), (AUTHORS_ORT, NORTON_ORT))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(WorkSettings):
    """Settings of benchmarks/table3.py."""

    tasks: tuple[Task, ...] = TASKS
    """Which rows of Table III."""
    rounds: int = 12
    """Measured calls of each model."""
    warm_up: int = 2
    """Calls before measuring."""
    plan: Path = PLANS / "table3.yaml"
    """Compression plan."""
    model: Path | None = None
    """Checkpoint of a trained NORTON detector, instead of random weights (its task only)."""
    baseline: Path | None = None
    """Checkpoint of the trained dense detector to compare with."""
    small: bool = False
    """Narrow heads, to try the benchmark out; not Table III's models."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    out: Path = RESULTS / "table3.json"
    """Results; a .md and an .html of the same name are written beside it."""
    work: Path = Path("runs/table3")
    """Folder for the exported graphs and the prepared images."""


def main(settings: Settings) -> int:
    """Measure what is missing and write the results."""
    if (settings.model is None) != (settings.baseline is None):
        raise UserError("--model and --baseline belong together; give both or neither")
    if settings.model is not None:
        settings = replace(settings, tasks=(trained_pair(settings)[0],))
    results = ResultCells(settings.out, settings_of(settings, "tasks"), report)
    return results.measure_all({task: partial(measure_task, task, settings) for task in settings.tasks})


def trained_pair(settings: Settings) -> tuple[Task, nn.Module, nn.Module, Categories]:
    """Task, dense model, NORTON model and categories of --baseline and --model.

    Raises:
        UserError: they are not detectors of one task.
    """
    assert settings.baseline is not None and settings.model is not None
    dense, norton = load_checkpoint(settings.baseline), load_checkpoint(settings.model)
    task = norton.header.task
    if task == "cls" or dense.header.task != task:
        raise UserError(f"--baseline is of task {dense.header.task}, --model of {task}; expected one detection task")
    return task, dense.model, norton.model, norton.header.categories


def random_pair(task: Task, settings: Settings, images: Sequence[Path]) -> tuple[nn.Module, nn.Module, Categories]:
    """A dense detector with seeded random weights and what `plan` makes of it."""
    heads = RoiSettings(box_features=64, mask_channels=(32,), keypoint_channels=(32,))
    narrow = DetectorSettings(backbone=BackboneSettings(fpn_channels=32), roi=heads)
    shape = narrow if settings.small else DetectorSettings()
    dense, categories = settings.random_detector(task, images, shape)
    return dense, settings.compressed(dense, CompressionPlan.load(settings.plan), images), categories


def measure_task(task: Task, settings: Settings) -> dict[str, Any]:
    """All six models of one row: latency in turn, stages, complexity, verdicts."""
    images, images_are = settings.prepare_images(settings.work)
    if settings.model is None:
        dense, norton, categories = random_pair(task, settings, images)
        weights = "random, calibrated"
    else:
        _, dense, norton, categories = trained_pair(settings)
        weights = f"{settings.baseline}, {settings.model}"
    for model in (dense, norton):
        settings.equalise(model)
    predictors: dict[str, Any] = {
        DENSE_EAGER: TorchPredictor(copy.deepcopy(dense), task, categories, device=settings.device),
        AUTHORS_EAGER: TorchPredictor(copy.deepcopy(norton), task, categories, device=settings.device),
        NORTON_EAGER: TorchPredictor(lower_model(norton), task, categories, device=settings.device),
    }
    graphs: dict[str, tuple[nn.Module, Form]] = {
        DENSE_ORT: (dense, "grouped"),
        NORTON_ORT: (norton, "grouped"),
        AUTHORS_ORT: (norton, "separable"),
    }
    for name, (model, form) in graphs.items():
        file = settings.work / f"{task}_{'dense' if name == DENSE_ORT else form}.onnx"
        print(f"{task}: exporting {name}", file=sys.stderr)
        graph = StaticRCNN(lower_model(model, form), GraphSettings(settings.image_size))
        export_onnx(graph, file, categories=categories)
        predictors[name] = OnnxRuntimePredictor(file, device=settings.device)
    print(f"{task}: measuring {len(predictors)} models, {settings.rounds} rounds", file=sys.stderr)
    ledger = measure_alternating(predictors, images, rounds=settings.rounds, warm_up=settings.warm_up)
    splits = {name: split_stages(predictor, images, calls=SPLIT_CALLS) for name, predictor in predictors.items()}
    counts = {"dense": settings.complexity(dense), "norton": settings.complexity(norton)}
    without = {"dense": settings.complexity(dense, 0), "norton": settings.complexity(norton, 0)}
    dense_macs, norton_macs = (stage_macs(complexity) for complexity in counts.values())
    ratios = {stage: norton_macs[stage] / dense_macs[stage] for stage in dense_macs}
    return {
        "images": images_are,
        "weights": weights,
        "device": {name: predictor.device for name, predictor in predictors.items()},
        "latency": {name: ledger.summary(name).to_dict() for name in predictors},
        "inexact_batches": {name: predictors[name].inexact_batches for name in graphs},
        "total_ms": ledger.to_dict(),
        "stages": {name: vars(split) for name, split in splits.items()},
        "complexity": {
            name: {"macs": without[name].macs, "macs_with_detections": c.macs, "params": c.params}
            for name, c in counts.items()
        },
        "speedup": [
            {"baseline": baseline, "candidate": candidate, **ledger.speedup(baseline, candidate).to_dict()}
            for baseline, candidate in COMPARISONS
        ],
        "macs_ceiling": {name: macs_ceiling(splits[name].stages_ms, ratios) for name in (DENSE_EAGER, DENSE_ORT)},
    }


if __name__ == "__main__":
    run(Settings, main)

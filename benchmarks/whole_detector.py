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
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table3 import ROOT, calibrate, equalise, prepare_images, read_results
from torch import nn

from benchmarks.lib.whole_detector_report import draw_plots, whole_detector_report
from norton_deploy import commands
from norton_deploy.compression.compress import compress
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.cost.form_tuning import TimingTable
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.predictor import read_image
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.latency import measure_alternating, summary_to_dict
from norton_deploy.reporting.provenance import provenance
from norton_deploy.search.end_to_end import Workload, export_tuned
from norton_deploy.structures import TASKS, Categories, Task

PLANS = ROOT.parent / "configs" / "plans"
SGEMM_SIDE, SGEMM_CALLS = 2048, 7


@dataclass
class Settings:
    """Settings of the benchmark."""

    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    plans: tuple[str, ...] = ("table3", "balanced", "fast")
    """Plans of configs/plans, beside the dense model; the last one is also scaled."""
    image_size: tuple[int, int] = (800, 800)
    """Height and width."""
    proposals: int = 1000
    """Proposals per image, for every model."""
    detections: int = 100
    """Detections per image, for every model."""
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
    images: Path | None = None
    """Folder of photographs; without it synthetic scenes are drawn (and the results say so)."""
    out: Path = ROOT / "results" / "whole_detector.json"
    """Results; a .md, an .html and two .png are written beside it."""
    work: Path = Path("runs/whole_detector")
    """Folder for exported graphs, prepared images and layer times."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the results."""
    settings = parse_settings(Settings, argv, prog="whole_detector", description=__doc__ or "")
    key = {name: str(value) for name, value in asdict(settings).items() if name not in ("out", "work")}
    results = read_results(settings.out, key)
    cells = results.setdefault("cells", {})
    results.pop("tasks", None)
    settings.work.mkdir(parents=True, exist_ok=True)
    for name, measure in cell_list(settings):
        if name in cells:
            print(f"{name}: already in {settings.out}", file=sys.stderr)
            continue
        started = time.perf_counter()
        cells[name] = {**measure(), "provenance": provenance(), "cell_s": time.perf_counter() - started}
        write_all(results, settings.out)
        print(f"{name}: {cells[name]['cell_s']:.0f} s", file=sys.stderr)
    write_all(results, settings.out)
    return 0


def cell_list(settings: Settings) -> list[tuple[str, Any]]:
    """Names of the cells and the calls that measure them, in order."""
    fast = settings.plans[-1]
    cells: list[tuple[str, Any]] = [(task, lambda task=task: measure_task(task, settings)) for task in settings.tasks]

    def scaled(kind: str, value: int, task: Task, changed: Settings, batch: int = 1) -> None:
        cells.append((f"{kind} {value}", lambda: measure_scaling(task, fast, changed, batch)))

    for side in settings.sizes:
        scaled("image side", side, "box", replace(settings, image_size=(side, side)))
    for count in settings.detection_counts:
        scaled("detections", count, "keypoint", replace(settings, detections=count))
    for batch in settings.batches:
        scaled("batch", batch, "box", settings, batch)
    return cells


def measure_task(task: Task, settings: Settings) -> dict[str, Any]:
    """Every plan in both engines, all in turn."""
    images, images_are = prepare(settings)
    models, categories = build_models(task, ("dense", *settings.plans), settings, images)
    table = timing_table(settings)
    predictors: dict[str, Any] = {}
    forms, complexity = {}, {}
    for name, model in models.items():
        predictors[f"{name}, torch eager"] = TorchPredictor(copy.deepcopy(model), task, categories)
        file = settings.work / f"{task}_{name}.onnx"
        print(f"{task}: exporting {name}", file=sys.stderr)
        forms[name] = export_tuned(model, workload(settings), categories, table, file)
        predictors[f"{name}, ONNX Runtime"] = OnnxRuntimePredictor(file)
        file.unlink()
        counted = count_complexity(
            model, settings.image_size, proposals=settings.proposals, detections=settings.detections
        )
        complexity[name] = {"macs": counted.macs, "params": counted.params}
    before = sgemm_gmacs_per_s()
    run = measure_alternating(predictors, images, rounds=settings.rounds, warm_up=settings.warm_up)
    rate = float(np.median(before + sgemm_gmacs_per_s()))
    latency = {}
    for name in predictors:
        summary = summary_to_dict(run.summary(name))
        done = complexity[name.partition(",")[0]]["macs"] / summary["p50_ms"] / 1e6
        latency[name] = {**summary, "gmacs_per_s": done, "sgemm_share": done / rate}
    baselines = ("dense, torch eager", "dense, ONNX Runtime")
    return {
        "images": images_are,
        "sgemm_gmacs_per_s": rate,
        "complexity": complexity,
        "latency": latency,
        "forms": {name: sorted(set(found.values())) for name, found in forms.items()},
        "total_ms": run.to_dict(),
        "speedup": [
            {"baseline": baseline, "candidate": name, **summary_to_dict(run.speedup(baseline, name))}
            for baseline in baselines
            for name in predictors
            if name.endswith("ONNX Runtime") and name != baseline
        ],
    }


def measure_scaling(task: Task, plan: str, settings: Settings, batch: int) -> dict[str, Any]:
    """Dense and one plan in ONNX Runtime at one size, number of detections and batch; ms per image."""
    images, _ = prepare(settings)
    models, categories = build_models(task, ("dense", plan), settings, images)
    table = timing_table(settings)
    predictors = {}
    for name, model in models.items():
        file = settings.work / f"scaled_{name}.onnx"
        export_tuned(model, replace(workload(settings), batch=batch), categories, table, file)
        predictors[name] = OnnxRuntimePredictor(file)
        file.unlink()
    pixels = [read_image(path) for path in images]
    times_ms: dict[str, list[float]] = {name: [] for name in predictors}
    for step in range(-settings.warm_up, settings.rounds):
        chosen = [pixels[(step * batch + index) % len(pixels)] for index in range(batch)]
        for name in sorted(predictors, reverse=bool(step % 2)):
            predictors[name](chosen)
            if step >= 0:
                times_ms[name].append(predictors[name].timing.total_ms / batch)
    return {
        "p50_ms": {name: float(np.median(times)) for name, times in times_ms.items()},
        "times_ms": times_ms,
    }


def prepare(settings: Settings) -> tuple[list[Path], str]:
    """Images of the settings' size."""
    height, width = settings.image_size
    folder = settings.work / f"images_{height}x{width}"
    folder.mkdir(parents=True, exist_ok=True)
    return prepare_images(settings.images, settings.image_size, folder)


def workload(settings: Settings) -> Workload:
    """One image of the settings."""
    return Workload(settings.image_size, settings.proposals, settings.detections)


def timing_table(settings: Settings) -> TimingTable:
    """This machine's layer times, kept for the next cells."""
    origin = provenance()
    machine = {"cpu": origin["machine"]["cpu"], "threads": origin["machine"]["torch_threads"], **origin["versions"]}
    return TimingTable(settings.work / "layer_times.json", machine)


def build_models(
    task: Task, names: Sequence[str], settings: Settings, images: Sequence[Path]
) -> tuple[dict[str, nn.Module], Categories]:
    """The dense detector with seeded random weights, and what each plan makes of it; calibrated and equalised."""
    models = {name: random_model(task, name, tuple(images)) for name in names}
    for model in models.values():
        equalise(model, settings.image_size, settings.proposals, settings.detections)
    count = 1 if task == "keypoint" else 90
    labels = tuple(range(1, count + 1))
    return models, Categories(labels, labels, tuple(f"class {label}" for label in labels))


MODELS: dict[tuple[Task, str], nn.Module] = {}
"""Models that a later cell needs again: compressing one takes as long as measuring it."""


def random_model(task: Task, name: str, images: Sequence[Path]) -> nn.Module:
    """One model, made once; its normalisation is calibrated on the first images that it is asked for."""
    if (task, name) not in MODELS:
        if name == "dense":
            torch.manual_seed(0)
            model: nn.Module = DetectorSettings(num_classes=2 if task == "keypoint" else 91).build(task)
        else:
            plan = CompressionPlan.load(PLANS / f"{name}.yaml")
            model = compress(random_model(task, "dense", images), plan, starts=1)
        calibrate(model.eval(), images)
        MODELS[task, name] = model
    return MODELS[task, name]


def sgemm_gmacs_per_s() -> list[float]:
    """10^9 multiply-accumulates per second of float32 matrix products of 2048 x 2048, call by call."""
    left, right = torch.rand(2, SGEMM_SIDE, SGEMM_SIDE)
    rates = []
    for _ in range(SGEMM_CALLS):
        started = time.perf_counter()
        torch.mm(left, right)
        rates.append(SGEMM_SIDE**3 / (time.perf_counter() - started) / 1e9)
    return rates[1:]


def write_all(results: dict[str, Any], out: Path) -> None:
    """JSON, plots, Markdown and HTML."""
    commands.write_json(results, out)
    report = whole_detector_report(results, draw_plots(results, out))
    for suffix, text in ((".md", report.to_markdown(out.parent)), (".html", report.to_html())):
        with atomic_write(out.with_suffix(suffix), "w") as stream:
            stream.write(text)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

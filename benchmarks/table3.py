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
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.lib.stage_split import split_stages, stage_macs
from norton_deploy import commands
from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.compression.compress import compress
from norton_deploy.compression.lowering import Form, lower_model
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import Complexity, count_complexity
from norton_deploy.data.image_folder import find_images
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.export.letterbox import Letterbox
from norton_deploy.export.onnx_export import export_onnx
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.files import atomic_write
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.predictor import read_image
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import ImageSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.latency import macs_ceiling, measure_alternating, summary_to_dict
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.table3 import (
    AUTHORS_EAGER,
    AUTHORS_ORT,
    DENSE_EAGER,
    DENSE_ORT,
    NORTON_EAGER,
    NORTON_ORT,
    table3_report,
)
from norton_deploy.structures import TASKS, Categories, Task

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
SYNTHETIC_IMAGES = 8
SPLIT_CALLS = 3
COMPARISONS = ((DENSE_EAGER, NORTON_ORT), (DENSE_EAGER, NORTON_EAGER), (AUTHORS_EAGER, NORTON_EAGER),
               (DENSE_ORT, NORTON_ORT), (DENSE_ORT, AUTHORS_ORT), (AUTHORS_ORT, NORTON_ORT))  # fmt: skip


@dataclass
class Settings:
    """Settings of the benchmark."""

    tasks: tuple[Task, ...] = TASKS
    """Which rows of Table III."""
    image_size: tuple[int, int] = (800, 800)
    """Height and width; every image is letterboxed to it, for every model."""
    rounds: int = 12
    """Measured calls of each model."""
    warm_up: int = 2
    """Calls before measuring."""
    images: Path | None = None
    """Folder of photographs; without it synthetic scenes are drawn (and the results say so)."""
    plan: Path = Path("configs/plans/table3.yaml")
    """Compression plan."""
    model: Path | None = None
    """Checkpoint of a trained NORTON detector, instead of random weights (its task only)."""
    baseline: Path | None = None
    """Checkpoint of the trained dense detector to compare with."""
    proposals: int = 1000
    """Proposals per image."""
    detections: int = 100
    """Detections per image."""
    small: bool = False
    """Narrow heads, to try the benchmark out; not Table III's models."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    out: Path = RESULTS / "table3.json"
    """Results; a .md and an .html of the same name are written beside it."""
    work: Path = Path("runs/table3")
    """Folder for the exported graphs and the prepared images."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the results."""
    settings = parse_settings(Settings, argv, prog="table3", description=__doc__ or "")
    if (settings.model is None) != (settings.baseline is None):
        raise UserError("--model and --baseline belong together; give both or neither")
    if settings.model is not None:
        settings = replace(settings, tasks=(trained_pair(settings)[0],))
    key = {name: str(value) for name, value in asdict(settings).items() if name not in ("out", "work", "tasks")}
    results = read_results(settings.out, key)
    settings.work.mkdir(parents=True, exist_ok=True)
    images, images_are = prepare_images(settings.images, settings.image_size, settings.work)
    for task in settings.tasks:
        if task in results["tasks"]:
            print(f"{task}: already in {settings.out}", file=sys.stderr)
            continue
        measured = measure_task(task, settings, images)
        results["tasks"][task] = {"images": images_are, "provenance": provenance(), **measured}
        commands.write_json(results, settings.out)
        report = table3_report(results)
        for suffix, text in ((".md", report.to_markdown(settings.out.parent)), (".html", report.to_html())):
            with atomic_write(settings.out.with_suffix(suffix), "w") as stream:
                stream.write(text)
        print(f"{task}: written to {settings.out}", file=sys.stderr)
    return 0


def read_results(path: Path, settings: dict[str, str]) -> dict[str, Any]:
    """What an earlier run with the same settings left, or an empty frame for the results.

    Raises:
        UserError: the file was made with other settings.
    """
    if not path.is_file():
        return {"settings": settings, "tasks": {}}
    results: dict[str, Any] = json.loads(path.read_text())
    if results.get("settings") != settings:
        raise UserError(f"{path}: was measured with other settings; move it away or choose another --out")
    return results


def prepare_images(source: Path | None, image_size: tuple[int, int], work: Path) -> tuple[list[Path], str]:
    """Image files in `work` of exactly `image_size` (so that no model resizes), and what they are, in words.

    Args:
        source: folder of photographs; None: synthetic scenes are drawn.
        image_size: height and width in pixels.
        work: folder that exists.
    """
    if source is None:
        arrays = [draw_scene(seed, image_size).image for seed in range(SYNTHETIC_IMAGES)]
        what = f"{len(arrays)} synthetic scenes, not photographs"
    else:
        files = find_images(source)
        arrays = []
        for file in files:
            image = read_image(file)
            canvas = np.empty((*image_size, 3), np.uint8)
            Letterbox.fit((image.shape[0], image.shape[1]), image_size).place(image, canvas)
            arrays.append(canvas)
        what = f"{len(files)} images of {source}"
    paths = []
    for index, image in enumerate(arrays):
        paths.append(work / f"image_{index:03d}.jpg")
        cv2.imwrite(str(paths[-1]), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return paths, what


def detector_settings(settings: Settings) -> DetectorSettings:
    """Torchvision's detector with Table III's image size; `small` narrows everything but the body."""
    full = DetectorSettings(image=ImageSettings(min_size=min(settings.image_size), max_size=max(settings.image_size)))
    if not settings.small:
        return full
    return replace(
        full,
        backbone=replace(full.backbone, fpn_channels=32),
        roi=replace(full.roi, box_features=64, mask_channels=(32,), keypoint_channels=(32,)),
    )


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
    """A dense detector with seeded random weights and what `plan` makes of it, both calibrated."""
    torch.manual_seed(0)
    shape = detector_settings(settings)
    if task == "keypoint":
        shape = replace(shape, num_classes=2)
    dense = shape.build(task).eval()
    calibrate(dense, images)
    norton = compress(dense, CompressionPlan.load(settings.plan), starts=1)
    calibrate(norton, images)
    labels = tuple(range(1, shape.num_classes))
    return dense, norton, Categories(labels, labels, tuple(f"class {label}" for label in labels))


def calibrate(model: Any, images: Sequence[Path]) -> None:
    """Set every frozen normalisation's statistics to those of its input for two images, front to back."""

    def measure(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        norm.running_mean = inputs[0].mean(dim=(0, 2, 3))
        norm.running_var = inputs[0].var(dim=(0, 2, 3)).clamp(min=1e-6)

    norms = [layer for layer in model.modules() if isinstance(layer, FrozenBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    batch = [torch.from_numpy(read_image(path)).permute(2, 0, 1).float() / 255 for path in images[:2]]
    with torch.no_grad():
        model.eval().backbone(model.transform(batch)[0].tensors)
    for handle in handles:
        handle.remove()


def equalise(model: Any, image_size: tuple[int, int], proposals: int, detections: int) -> None:
    """Give a detector the same image size, proposals and detections as all others, in place."""
    model.transform.min_size, model.transform.max_size = (min(image_size),), max(image_size)
    for counts in (model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n):
        counts["testing"] = proposals
    model.roi_heads.score_thresh = 0.0
    model.roi_heads.detections_per_img = detections


def measure_task(task: Task, settings: Settings, images: Sequence[Path]) -> dict[str, Any]:
    """All six models of one row: latency in turn, stages, complexity, verdicts."""
    if settings.model is None:
        dense, norton, categories = random_pair(task, settings, images)
        weights = "random, calibrated"
    else:
        _, dense, norton, categories = trained_pair(settings)
        weights = f"{settings.baseline}, {settings.model}"
    for model in (dense, norton):
        equalise(model, settings.image_size, settings.proposals, settings.detections)
    graphs: dict[str, tuple[nn.Module, Form]] = {
        DENSE_ORT: (dense, "grouped"),
        NORTON_ORT: (norton, "grouped"),
        AUTHORS_ORT: (norton, "separable"),
    }
    predictors: dict[str, Any] = {
        DENSE_EAGER: TorchPredictor(copy.deepcopy(dense), task, categories, device=settings.device),
        AUTHORS_EAGER: TorchPredictor(copy.deepcopy(norton), task, categories, device=settings.device),
        NORTON_EAGER: TorchPredictor(lower_model(norton), task, categories, device=settings.device),
    }
    for name, (model, form) in graphs.items():
        file = settings.work / f"{task}_{'dense' if name == DENSE_ORT else form}.onnx"
        print(f"{task}: exporting {name}", file=sys.stderr)
        graph = StaticRCNN(lower_model(model, form), GraphSettings(settings.image_size))
        export_onnx(graph, file, categories=categories)
        predictors[name] = OnnxRuntimePredictor(file, device=settings.device)
    print(f"{task}: measuring {len(predictors)} models, {settings.rounds} rounds", file=sys.stderr)
    run = measure_alternating(predictors, images, rounds=settings.rounds, warm_up=settings.warm_up)
    splits = {name: split_stages(predictor, images, calls=SPLIT_CALLS) for name, predictor in predictors.items()}
    counts = {"dense": count(dense, settings), "norton": count(norton, settings)}
    dense_macs, norton_macs = (stage_macs(complexity) for complexity in counts.values())
    ratios = {stage: norton_macs[stage] / dense_macs[stage] for stage in dense_macs}
    without = {"dense": count(dense, settings, 0), "norton": count(norton, settings, 0)}
    return {
        "weights": weights,
        "device": {name: predictor.device for name, predictor in predictors.items()},
        "latency": {name: summary_to_dict(run.summary(name)) for name in predictors},
        "inexact_batches": {name: predictors[name].inexact_batches for name in graphs},
        "total_ms": run.to_dict(),
        "stages": {name: vars(split) for name, split in splits.items()},
        "complexity": {
            name: {"macs": without[name].macs, "macs_with_detections": c.macs, "params": c.params}
            for name, c in counts.items()
        },
        "speedup": [
            {"baseline": baseline, "candidate": candidate, **summary_to_dict(run.speedup(baseline, candidate))}
            for baseline, candidate in COMPARISONS
        ],
        "macs_ceiling": {name: macs_ceiling(splits[name].stages_ms, ratios) for name in (DENSE_EAGER, DENSE_ORT)},
    }


def count(model: nn.Module, settings: Settings, detections: int | None = None) -> Complexity:
    """MACs and parameters with the benchmark's proposals and detections."""
    found = settings.detections if detections is None else detections
    return count_complexity(model, settings.image_size, proposals=settings.proposals, detections=found)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

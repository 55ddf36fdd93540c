"""Correctness on a GPU: the parity gate's own comparisons, with the static module on the device as the graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.gpu_bench import Bench, Graph, Precision, Variant, arithmetic, explain, static_module
from norton_deploy.export.static_rcnn import GraphSettings
from norton_deploy.parity.eager_stages import EagerStages
from norton_deploy.parity.references import Reference, compare_detections, thinned
from norton_deploy.parity.report import TOLERANCES, ParityReport
from norton_deploy.parity.stages import compare_layers, compare_selection, compare_task, decoded
from norton_deploy.structures import Detections, Task


@dataclass
class Subject:
    """Attributes: a detector on the CPU in evaluation mode; its frames' size; the task of its prepared references."""

    name: str
    model: Any
    image_size: tuple[int, int]
    prepared: Task | None


def compare(bench: Bench, subject: Subject, precision: Precision, results: dict[str, Any]) -> None:
    """Judge one detector in one precision; TF32 is held to what fp16 is held to."""
    name = f"{subject.name} {precision}"
    if bench.left() < 0:
        results[name] = "no time left"
        return
    try:
        results[name] = judge(bench, subject, precision)
    except Exception as error:
        results[name] = {"error": explain(error)}


@torch.no_grad()
def judge(bench: Bench, subject: Subject, precision: Precision) -> dict[str, Any]:
    """Stages of the first frames against eager mode on this machine's CPU, detections of all against the references."""
    limits = TOLERANCES["fp32" if precision == "fp32" else "fp16"]
    report = ParityReport(subject.name, precision)
    eager = EagerStages(subject.model, subject.image_size, int(subject.model.roi_heads.detections_per_img))
    frames = scenes(bench, subject, 8 if subject.prepared is not None and not bench.smoke else 1)
    expected = references(bench, subject, len(frames))
    variant = Variant("box", "", precision, layout="NHWC" if precision == "fp16" else "NCHW")
    settings = GraphSettings(subject.image_size, target="tensorrt")
    static = static_module(subject.model, settings, variant, bench.device)
    graph = Graph(bench, static, torch.from_numpy(frames[:1]).to(bench.device), precision)
    for index in range(len(frames)):
        batch = frames[index : index + 1]
        graph.frames.copy_(torch.from_numpy(batch))
        outputs = {key: value.cpu().numpy() for key, value in graph.replay().items()}
        with arithmetic(precision):
            parts = static.outputs_and_stages(graph.frames)
        direct, stages = ({key: value.cpu().numpy() for key, value in part.items()} for part in parts)
        for flag in report.inexact:
            report.inexact[flag] += int(not outputs[flag].all())
        report.images += 1
        compare_layers(report, eager, batch, stages, limits)
        compare_selection(report, "detections", eager, stages, direct, limits, np.ones(1, bool))
        compare_task(report, eager, stages, direct, limits)
        pairs = [("final", eager.references(batch, limits), direct)]
        if expected is not None:
            sample = thinned(len(expected[index]))
            prepared = Reference(expected[index], sample, expected[index][sample].masks)
            pairs.append(("graph, against the prepared references", [prepared], outputs))
        for name, reference, arrays in pairs:
            found = decoded(arrays, eager, static.mask_paste)
            report.detections += len(found[0]) if name == "final" else 0
            compare_detections(report, name, reference, found, limits, **eager.cuts)
    return report.to_dict()


def scenes(bench: Bench, subject: Subject, count: int) -> np.ndarray:
    """Frames [count, H, W, 3]: prepared scenes for a trained detector, else drawn noise."""
    if subject.prepared is None:
        return np.stack(bench.host_frames(count, subject.image_size))
    if bench.prepared is not None:
        with np.load(bench.prepared / "scenes.npz") as stored:
            return np.asarray(stored["scenes"][:count])
    return draw_scenes(count, subject.image_size)


def draw_scenes(count: int, image_size: tuple[int, int]) -> np.ndarray:
    """Drawn scenes uint8 [count, H, W, 3]."""
    from norton_deploy.data.synthetic.scene import draw_scene

    return np.stack([draw_scene((7, seed), image_size).image for seed in range(count)])


def references(bench: Bench, subject: Subject, count: int) -> list[Detections] | None:
    """The prepared references of a detector, made on another machine's CPU; None without a folder."""
    if bench.prepared is None or subject.prepared is None:
        return None
    found = []
    with np.load(bench.prepared / f"{subject.prepared}.npz") as stored:
        for index in range(count):
            part = {key: stored[f"{index}.{key}"] for key in ("boxes", "scores", "labels")}
            masks = keypoints = None
            if f"{index}.masks" in stored:
                shape = (len(part["boxes"]), *subject.image_size)
                masks = np.unpackbits(stored[f"{index}.masks"], count=int(np.prod(shape))).reshape(shape).astype(bool)
            if f"{index}.keypoints" in stored:
                keypoints = stored[f"{index}.keypoints"]
            found.append(Detections(**part, image_size=subject.image_size, masks=masks, keypoints=keypoints))
    return found


@torch.no_grad()
def prepare(folder: Path, count: int = 8) -> None:
    """Scenes, and what torchvision's eager detectors find in them on this CPU."""
    from norton_deploy.checkpoints.checkpoint import load_checkpoint
    from norton_deploy.inference.loading import PACKAGED_TASKS, packaged_detector

    folder.mkdir(parents=True, exist_ok=True)
    size = (192, 256)
    frames = draw_scenes(count, size)
    np.savez_compressed(folder / "scenes.npz", scenes=frames)
    for task in PACKAGED_TASKS:
        model: Any = load_checkpoint(packaged_detector(task)).model
        eager = EagerStages(model, size, int(model.roi_heads.detections_per_img))
        arrays: dict[str, Any] = {}
        for index, found in enumerate(eager.whole(frames)):
            arrays |= {f"{index}.{key}": getattr(found, key) for key in ("boxes", "scores", "labels")}
            if found.masks is not None:
                arrays[f"{index}.masks"] = np.packbits(found.masks)
            if found.keypoints is not None:
                arrays[f"{index}.keypoints"] = found.keypoints
        np.savez_compressed(folder / f"{task}.npz", **arrays)

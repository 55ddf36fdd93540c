"""The demo's report: dense beside compressed in the form of Table III, and what the numbers are not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.cost.complexity import Complexity, complexity_of
from norton_deploy.data.image_file import read_image
from norton_deploy.data.image_folder import find_images
from norton_deploy.evaluation.coco_metrics import primary_iou_type, table3_scores
from norton_deploy.files import atomic_write
from norton_deploy.inference.drawing import draw_detections
from norton_deploy.inference.loading import PACKAGED_TASKS, load_predictor, packaged_path
from norton_deploy.inference.predictor import Predictor
from norton_deploy.reporting.detector_table import MODEL_NAMES, DetectorRow, detector_table
from norton_deploy.reporting.latency import LatencyRun, measure_alternating
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.report import Block, Heading, Paragraph, Picture, Report, Table
from norton_deploy.structures import Task

LATENCY_ROUNDS = 40
PICTURES = 6
DRAWN_SCORE = 0.5
CAVEATS = """\
These figures show that the whole path works and what compression costs here; they are not COCO figures. \
The images are drawn by a program, the ResNet-50 was pretrained for minutes on crops of them instead of on \
ImageNet, and both detectors were trained for the same few hundred steps, far from convergence: a longer run \
raises both. Outline and inner drawing carry most of the class signal, a favourite hue per category the rest. \
Latency and FPS are those of PyTorch in eager mode on this machine, at the demo's small image size, both models \
in turn on the same images; exported graphs are faster. The paper's lines are quoted from its Table III \
(COCO-2017, 800 pixels, RTX 3060) and were not measured here."""

PACKAGED = """\
These detectors come with the package: NORTON by fast.yaml, trained for longer than the demo on scenes drawn by the \
same program; these images were not among them."""


def write_demo_report(out: Path, task: Task, *, dense: Path, compressed: Path, data: Path, command: str) -> Path:
    """Measure latency, draw detections and write report.md, report.html and report.json into `out`.

    Args:
        out: folder of the demo.
        task: of both detectors.
        dense: folder of the dense detector's training run (last.safetensors, metrics.json).
        compressed: folder of the compressed detector's.
        data: dataset; its validation images are used.
        command: the command line, for the record.

    Returns:
        Path of report.md.
    """
    folders = {"dense": dense, "NORTON": compressed}
    models = {name: load_predictor(folder / "last.safetensors") for name, folder in folders.items()}
    metrics = {name: json.loads((folder / "metrics.json").read_text()) for name, folder in folders.items()}
    images = find_images(data / "val2017")
    latency = measure_alternating(models, images, rounds=LATENCY_ROUNDS)
    loaded = {name: load_checkpoint(folder / "last.safetensors") for name, folder in folders.items()}
    counts = {name: complexity_of(found.model, found.header.settings) for name, found in loaded.items()}
    shown = images[: 4 * PICTURES : 4]
    pairs = _draw_panels(models, shown, out / "pictures", "detections")
    packaged = {kind: load_predictor(packaged_path(kind)) for kind in PACKAGED_TASKS if packaged_path(kind).is_file()}
    blocks: list[Block] = []
    if packaged:
        blocks.append(Heading(f"Detections of the packaged detectors on held-out images: {', '.join(packaged)}"))
        blocks.append(Paragraph(PACKAGED))
        blocks += [Picture(path, path.stem) for path in _draw_panels(packaged, shown, out / "pictures", "packaged")]

    report = Report(f"Demo: {MODEL_NAMES[task]}, dense and compressed, on the embedded data")
    rows = [_row(name, task, metrics, latency, counts) for name in folders]
    held_out = f"{len(images)} held-out images, {metrics['dense']['steps']} training steps each"
    report.blocks += [
        Paragraph(CAVEATS),
        detector_table(rows, f"Table III's form: {held_out}", paper=task),
        _score_table(task, metrics),
        Paragraph(f"{latency.speedup('dense', 'NORTON').verdict} (PyTorch, one image at a time)."),
        *blocks,
        Heading("Detections of this short run: dense left, compressed right"),
        *(Picture(path, path.stem) for path in pairs),
        Heading("How it was made"),
        Paragraph(f"Command: {command}"),
        *(Paragraph(f"{entry['seconds']} s: {entry['command']}") for entry in _steps(out)),
    ]
    with atomic_write(out / "report.md", "w") as stream:
        stream.write(report.to_markdown(out))
    with atomic_write(out / "report.html", "w") as stream:
        stream.write(report.to_html())
    record: dict[str, Any] = {
        "provenance": provenance() | {"command": command},
        "task": task,
        "held_out_images": len(images),
        "steps": _steps(out),
        "metrics": {name: entry["metrics"] for name, entry in metrics.items()},
        "complexity": {name: {"macs": c.macs, "params": c.params} for name, c in counts.items()},
        "latency": {name: latency.summary(name).to_dict() for name in folders},
        "speedup": latency.speedup("dense", "NORTON").to_dict(),
    }
    with atomic_write(out / "report.json", "w") as stream:
        stream.write(json.dumps(record, indent=2) + "\n")
    return out / "report.md"


def _row(
    name: str, task: Task, metrics: dict[str, Any], latency: LatencyRun, counts: dict[str, Complexity]
) -> DetectorRow:
    average_precision, average_recall = table3_scores(task, metrics[name]["metrics"])
    summary = latency.summary(name)
    return DetectorRow(
        model=MODEL_NAMES[task] if name == "dense" else name,
        runs_on="this machine, PyTorch",
        macs=counts[name].macs,
        params=counts[name].params,
        dense_macs=counts["dense"].macs,
        dense_params=counts["dense"].params,
        fps=summary.fps,
        latency_ms=summary.p50_ms,
        ap=average_precision,
        ar=average_recall,
    )


def _score_table(task: Task, metrics: dict[str, Any]) -> Table:
    """Every measure of both detectors, and what the compressed one keeps."""
    kinds = list(metrics["dense"]["metrics"])
    rows = []
    for kind in kinds:
        for measure, dense in metrics["dense"]["metrics"][kind].items():
            if dense < 0:  # pycocotools' sign for "no objects of this size".
                continue
            small = metrics["NORTON"]["metrics"][kind][measure]
            kept = f"{small / dense:.2f}" if dense > 0 else "-"
            rows.append((kind, measure, f"{dense:.3f}", f"{small:.3f}", kept))
    caption = f"All COCO measures (Table III's AP and AR are {primary_iou_type(task)}'s)"
    return Table(("IoU type", "Measure", "dense", "NORTON", "kept"), tuple(rows), caption)


def _draw_panels(models: Mapping[Any, Predictor], images: list[Path], folder: Path, name: str) -> list[Path]:
    """Detections of score >= 0.5 of all models side by side, one picture per image, enlarged twice."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, path in enumerate(images):
        image = read_image(path)
        large = np.array(Image.fromarray(image).resize((2 * image.shape[1], 2 * image.shape[0])))
        panels = []
        for model in models.values():
            found = model([large])[0]
            panels.append(draw_detections(large, found[found.scores >= DRAWN_SCORE], model.categories))
        gap = np.full((large.shape[0], 8, 3), 255, np.uint8)
        target = folder / f"{name}-{number + 1}.jpg"
        Image.fromarray(np.hstack([part for panel in panels for part in (panel, gap)][:-1])).save(target, quality=90)
        pictures.append(target)
    return pictures


def _steps(out: Path) -> list[dict[str, Any]]:
    """The records of the demo's steps, in the order in which they ran."""
    records = sorted((out / "steps").rglob("*.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in records]

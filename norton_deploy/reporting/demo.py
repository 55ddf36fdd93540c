"""The demo's report: a deployment's, of detectors that were trained for minutes on drawn images."""

import json
from pathlib import Path
from typing import Any

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.cost.complexity import complexity_of
from norton_deploy.data.image_folder import find_images
from norton_deploy.evaluation.evaluate import FileEvaluation, evaluate_file
from norton_deploy.reporting.compared_images import compare_images
from norton_deploy.reporting.deployment import Deployment, ModelRecord, StepRecord
from norton_deploy.reporting.deployment_report import write_report
from norton_deploy.reporting.detector_table import MODEL_NAMES
from norton_deploy.reporting.latency import LatencySummary, measure_alternating
from norton_deploy.reporting.provenance import provenance
from norton_deploy.structures import Task
from norton_deploy.training.run_log import read_log

LATENCY_ROUNDS = 40
CAVEATS = """\
These figures show that the whole path works and what compression costs here; they are not COCO figures. \
The images are drawn by a program, the ResNet-50 was pretrained for minutes on crops of them instead of on \
ImageNet, and both detectors were trained for the same few hundred steps, far from convergence: a longer run \
raises both. Outline and inner drawing carry most of the class signal, a favourite hue per category the rest. \
Latency and FPS are those of PyTorch in eager mode on this machine, at the demo's small image size, both models \
in turn on the same images; exported graphs are faster."""


def write_demo_report(out: Path, task: Task, *, dense: Path, compressed: Path, data: Path, command: str) -> Path:
    """Evaluate, measure latency and write report.html, report.md and report.json into `out`.

    Args:
        dense: folder of the dense detector's training run.
        data: dataset; its validation images are used.
        command: the command line, for the record.

    Returns:
        Path of report.html.
    """
    evaluated = {
        name: evaluate_file(folder / "last.safetensors", data, task)
        for name, folder in (("dense", dense), ("NORTON", compressed))
    }
    models = {name: evaluation.predictor for name, evaluation in evaluated.items()}
    latency = measure_alternating(models, find_images(data / "val2017"), rounds=LATENCY_ROUNDS)
    results = [evaluation.evaluation.results for evaluation in evaluated.values()]
    deployment = Deployment(
        title=f"Demo: {MODEL_NAMES[task]}, dense and compressed, on the embedded data",
        task=task,
        dense=_record("dense", dense, evaluated["dense"], latency.summary("dense")),
        small=_record("NORTON", compressed, evaluated["NORTON"], latency.summary("NORTON")),
        provenance=provenance() | {"command": command},
        data="drawn scenes",
        images=evaluated["dense"].images,
        speedup=latency.speedup("dense", "NORTON"),
        artefact=(compressed / "last.safetensors").relative_to(out).as_posix(),
        compared=compare_images(out, evaluated["dense"].dataset, *results),
        training=read_log(compressed / "log.jsonl"),
        steps=tuple(StepRecord(step.get("title", ""), step["command"], step["seconds"]) for step in _steps(out)),
        notes=(CAVEATS,),
    )
    return write_report(out, deployment)


def _record(name: str, run: Path, evaluated: FileEvaluation, latency: LatencySummary) -> ModelRecord:
    file = run / "last.safetensors"
    found = load_checkpoint(file)
    counted = complexity_of(found.model, found.header.settings)
    return ModelRecord(
        name=name,
        file=f"{run.name}/{file.name}",
        runs_on="this machine, PyTorch",
        macs=counted.macs,
        params=counted.params,
        file_bytes=file.stat().st_size,
        scores=dict(evaluated.evaluation.scores.items()),
        latency=latency,
    )


def _steps(out: Path) -> list[dict[str, Any]]:
    """The records of the demo's steps, in the order in which they ran."""
    records = sorted((out / "steps").rglob("*.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in records]

"""How well and how fast model files detect on one's own data: the figures that deployments and comparisons share."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from norton_deploy.config import from_mapping
from norton_deploy.cost.turns import Speedup
from norton_deploy.data.image_folder import find_images
from norton_deploy.evaluation.coco_metrics import MeasureScore
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.files import atomic_write
from norton_deploy.inference.predictor import Backend, Predictor
from norton_deploy.reporting.deployment import ModelRecord
from norton_deploy.reporting.latency import LatencySummary, measure_alternating
from norton_deploy.structures import Task

DENSE, SMALL = "dense", "small"
TIMED_IMAGES = 8


def score_file(
    file: Path,
    data: Path,
    task: Task,
    results: Path,
    *,
    backend: Backend | None = None,
    limit: int | None = None,
    categories: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model file on val; what a stopped evaluation found is not found again.

    Args:
        file, data, task, backend, limit, categories: see `evaluate_file`.
        results: gets the COCO results entries, all fields in one JSON list.

    Returns:
        JSON values: "runs_on", "images", "scores" (of `MeasureScore`).
    """
    found = evaluate_file(
        file, data, task, backend=backend, limit=limit, categories=categories, results=results, resume=True,
        overwrite=True,
    )  # fmt: skip
    with atomic_write(results, "w") as stream:
        json.dump(found.evaluation.results, stream)
    if found.journal is not None:
        found.journal.remove()
    scores = {measure: asdict(score) for measure, score in found.evaluation.scores.items()}
    return {"runs_on": found.predictor.device, "images": found.images, "scores": scores}


def timed_images(data: Path) -> list[Path]:
    """Eight image files of val, evenly spaced; fewer where it has fewer."""
    images = find_images(data / "val2017")
    return images[:: max(1, len(images) // TIMED_IMAGES)][:TIMED_IMAGES]


def time_in_turn(predictors: Mapping[str, Predictor], data: Path, rounds: int) -> dict[str, Any]:
    """Time loaded models in turn on val's images, decoding included.

    Returns:
        JSON values: "latency" (name -> `LatencySummary`), "runs_on" (name -> engine and machine), and "speedup" of
        "small" over "dense" where both are there.
    """
    run = measure_alternating(predictors, timed_images(data), rounds=rounds)
    found: dict[str, Any] = {
        "latency": {name: run.summary(name).to_dict() for name in predictors},
        "runs_on": {name: predictor.device for name, predictor in predictors.items()},
    }
    if {DENSE, SMALL} <= predictors.keys():
        found["speedup"] = vars(run.speedup(DENSE, SMALL))
    return found


def speedup_of(timing: Mapping[str, Any] | None) -> Speedup | None:
    """Of `time_in_turn`'s JSON values."""
    return None if timing is None or "speedup" not in timing else Speedup(**timing["speedup"])


def model_record(
    name: str,
    file: Path,
    folder: Path,
    score: Mapping[str, Any] | None,
    timing: Mapping[str, Any] | None,
    timed_as: str = "",
    *,
    macs: float | None = None,
    params: float | None = None,
) -> ModelRecord:
    """One line of the report, from what `score_file` and `time_in_turn` returned.

    Args:
        name: what the report calls it.
        file: the model.
        folder: of the report.
        score, timing: JSON values, None where nothing was measured.
        timed_as: its name in `timing`.
        macs, params: of the model.
    """
    latency = None if timing is None else timing["latency"].get(timed_as)
    evaluated_on = "not run here" if score is None else score["runs_on"]
    scores = {} if score is None else score["scores"]
    return ModelRecord(
        name=name,
        file=file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name,
        runs_on=evaluated_on if timing is None or latency is None else timing["runs_on"][timed_as],
        macs=macs,
        params=params,
        file_bytes=file.stat().st_size,
        scores={measure: from_mapping(MeasureScore, values, name) for measure, values in scores.items()},
        latency=None if latency is None else LatencySummary(**latency),
    )


def read_results(file: Path) -> list[dict[str, Any]]:
    """What `score_file` wrote."""
    entries: list[dict[str, Any]] = json.loads(file.read_text())
    return entries

"""Fine-tuning of a detector on the embedded data's recipe, and its AP."""

from pathlib import Path
from typing import Any, Literal

from benchmarks.lib.training_runs import LAST, read_recipe, train_once
from norton_deploy.checkpoints.checkpoint import Checkpoint
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.structures import TASKS, Task
from norton_deploy.training.detector_training import DetectorTrainingSettings

Precision = Literal["no", "bf16"]


def task_of(checkpoint: Checkpoint, path: Path) -> Task:
    """What a detector does.

    Raises:
        UserError: the checkpoint holds a classifier.
    """
    for task in TASKS:
        if task == checkpoint.header.task:
            return task
    raise UserError(f"{path}: holds a classifier, expected a detector")


def finetuned(start: Path, task: Task, data: Path, out: Path, **given: Any) -> Path:
    """Train from a checkpoint with configs/train/demo_TASK.yaml once; returns the checkpoint after the last step.

    Args:
        given: fields of the recipe that have other values.
    """
    recipe = read_recipe(
        DetectorTrainingSettings, f"demo_{task}", task=task, data=data, init=start, out=out, evaluate_every=0, **given
    )
    train_once(recipe)
    return out / LAST


def average_precision(model: Path, task: Task, data: Path, images: int) -> dict[str, Any]:
    """AP and AR on the first images of the val split: {"images", "metrics"}."""
    found = evaluate_file(model, data, task, limit=images, progress=False).to_dict()
    return {"images": found["images"], "metrics": found["metrics"]}

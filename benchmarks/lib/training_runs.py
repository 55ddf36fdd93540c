"""Training runs of benchmarks: one that is done is not run again, one that was stopped goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.lib.cells import CONFIGS
from norton_deploy.config import from_mapping, read_yaml
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.reporting.provenance import provenance
from norton_deploy.training.classifier_training import ClassifierTrainingSettings, train_classifier
from norton_deploy.training.detector_training import DetectorTrainingSettings, train_detector
from norton_deploy.training.initial_weights import InitialModel
from norton_deploy.training.run_folder import RunFolder, check_identity

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")
LAST = "last.safetensors"
PRECISION_NAMES = {"no": "float32", "bf16": "mixed with bfloat16"}
"""A training's `precision` -> what tables call it."""


def read_recipe(settings_class: type[S], name: str, **given: Any) -> S:
    """configs/train/NAME.yaml with some fields replaced, those of nested mappings one by one.

    Raises:
        UserError: the recipe is not there, or a field is wrong.
    """
    path = CONFIGS / "train" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"{path}: not found; run the benchmark from the repository's root folder")
    return from_mapping(settings_class, _merged(read_yaml(path), given), str(path))


def _merged(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    changed = {
        name: _merged(values.get(name, {}), new) if isinstance(new, dict) else new for name, new in given.items()
    }
    return {**values, **changed}


def train_once(
    settings: ClassifierTrainingSettings | DetectorTrainingSettings, *, start: InitialModel | None = None
) -> dict[str, Any]:
    """Train into `settings.out`, from its last state where there is one; returns {"steps", "metrics"}.

    Of a run that has ended, the newest weights and metrics.json stay.

    Args:
        start: a classifier whose structure no checkpoint can name, instead of `settings.init`.

    Raises:
        UserError: the folder's run has other settings; and as the training.
    """
    folder = RunFolder(settings.out)
    done = settings.out / "metrics.json"
    if done.is_file():
        wanted = {name: value for name, value in settings.identity().items() if name != "detector"}
        found = json.loads(folder.settings.read_text())
        check_identity(folder.settings, {name: found.get(name) for name in wanted}, wanted)
    else:
        resume = folder.state.is_file()
        settings = replace(settings, resume=resume, overwrite=folder.settings.is_file() and not resume, progress=False)
        command = provenance()["command"]
        if isinstance(settings, ClassifierTrainingSettings):
            result = train_classifier(settings, command=command, start=start)
        else:
            result = train_detector(settings, command=command)
        with atomic_write(done, "w") as stream:
            json.dump({"steps": result.steps, "metrics": result.metrics}, stream, indent=1)
        for file in (folder.state, folder.best):  # some 400 MB a run that nobody needs once it has ended
            file.unlink(missing_ok=True)
    figures: dict[str, Any] = json.loads(done.read_text())
    return figures

"""Grad-CAM of a dense model and its compressed forms side by side, and how far their maps agree.

Classifiers are asked for the class that the dense model predicts; detectors for the detection that all models share
and are surest of, or for a given box. The picture shows some images; the correlations are means over all.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from norton_deploy.checkpoints.checkpoint import Checkpoint
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.commands import write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import find_images, read_images
from norton_deploy.errors import UserError
from norton_deploy.files import check_output_file
from norton_deploy.reporting.gradcam import (
    Question,
    ask_classifier,
    ask_detector,
    draw_gradcam,
    explained_layers,
    gradcam_maps,
    map_correlation,
)
from norton_deploy.reporting.provenance import provenance

DENSE = "dense"


@dataclass(frozen=True)
class Settings:
    """Settings of tools/gradcam.py."""

    model: Path
    """The dense classifier or detector (.safetensors, or torchvision's .pth)."""
    compressed: tuple[Path, ...]
    """Its compressed forms, one or several, in the order of the columns."""
    images: Path
    """Folder of images, or one image."""
    out: Path
    """Picture to write (.png or .jpg)."""
    count: int = 50
    """Images over which the correlations are averaged, at most."""
    rows: int = 5
    """Images in the picture, at most."""
    layers: tuple[str, ...] = ()
    """Layers whose output is mapped; by default three levels, the last stages of the backbone."""
    box: tuple[float, float, float, float] | None = None
    """Detectors: the box to explain, xyxy in pixels, of one image; by default the best detection that all share."""
    json: Path | None = None
    """Write the correlations as JSON to a file, or to stdout with '-'."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="gradcam", description=__doc__ or "")
    if settings.out.suffix not in (".png", ".jpg"):
        raise UserError(f"--out {settings.out}: expected a .png or .jpg file")
    if settings.count < 1 or settings.rows < 1:
        raise UserError("--count, --rows: expected at least 1")
    if not settings.compressed:
        raise UserError("--compressed: expected one or several models after it")
    check_output_file(settings.json, "--json")
    if settings.box is not None and len(find_images(settings.images)) != 1:
        raise UserError(f"--box: goes with one image, {settings.images} holds more")
    models = open_models(settings)
    dense = models[DENSE]
    layers = list(settings.layers) or explained_layers(dense.model)
    names = dict(zip(dense.header.categories.labels, dense.header.categories.names, strict=True))
    shown: list[tuple[Question, str, dict[str, Any]]] = []
    found: dict[str, dict[str, list[float]]] = {name: {layer: [] for layer in layers} for name in models}
    asked = skipped = 0
    for image in read_images(settings.images, settings.count):
        question = ask(models, image, settings)
        if question is None:
            skipped += 1
            continue
        asked += 1
        maps = {name: gradcam_maps(checkpoint.model, question, layers) for name, checkpoint in models.items()}
        for name, layer in ((name, layer) for name in models for layer in layers):
            correlation = map_correlation(maps[DENSE][layer], maps[name][layer])
            found[name][layer] += [] if correlation is None else [correlation]
        if len(shown) < settings.rows:
            shown.append((question, names[question.label + (question.box is None)], maps))
    if asked == 0:
        raise UserError(
            f"{settings.images}: the models share no detection in {skipped} images; give an image and --box"
        )
    draw_gradcam(settings.out, shown, list(models))
    figures: dict[str, Any] = {
        "model": str(settings.model),
        "images": asked,
        "images_without_a_shared_detection": skipped,
        "correlation": {name: summary(found[name]) for name in models if name != DENSE},
        "provenance": provenance(),
    }
    for name, levels in figures["correlation"].items():
        means = ", ".join(f"{layer} {level['mean']}" for layer, level in levels.items())
        print(f"{name} against dense, mean correlation of the maps of {asked} images: {means}", file=sys.stderr)
    write_json(figures, settings.json)
    return 0


def open_models(settings: Settings) -> dict[str, Checkpoint]:
    """The dense model and its compressed forms, by their names in the picture.

    Raises:
        UserError: they are not of one task with the same categories.
    """
    models = {DENSE: open_model(str(settings.model))}
    for path in settings.compressed:
        name = path.stem if path.stem not in ("last", "best") else path.parent.name
        if name in models:
            raise UserError(f"--compressed {path}: a second model named '{name}'; rename the file or its folder")
        models[name] = open_model(str(path))
        own, expected = models[name].header, models[DENSE].header
        if (own.task, own.categories) != (expected.task, expected.categories):
            raise UserError(f"--compressed {path}: is a {own.task} model of other categories than {settings.model}")
    return models


def ask(models: dict[str, Checkpoint], image: torch.Tensor, settings: Settings) -> Question | None:
    """What the models are to explain in an image."""
    if models[DENSE].header.task == "cls":
        if settings.box is not None:
            raise UserError("--box: goes with detectors, not with a classifier")
        return ask_classifier(models[DENSE].model, image, models[DENSE].header.classifier)
    if settings.box is not None:
        (left, top, right, bottom), (height, width) = settings.box, image.shape[-2:]
        if not (max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)):
            raise UserError(f"--box {settings.box}: covers nothing of the image, which has {width} x {height} pixels")
    return ask_detector([checkpoint.model for checkpoint in models.values()], image, settings.box)


def summary(levels: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Layer -> mean, standard deviation and number of the correlations (maps that are constant have none)."""
    result: dict[str, dict[str, Any]] = {}
    for layer, values in levels.items():
        numbers = torch.tensor(values, dtype=torch.float64)
        result[layer] = {
            "mean": round(float(numbers.mean()), 4) if values else None,
            "std": round(float(numbers.std(correction=0)), 4) if values else None,
            "maps": len(values),
        }
    return result

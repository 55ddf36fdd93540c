"""Count multiply-accumulate operations (MACs) and parameters, dense and compressed, per layer and in total."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from norton_deploy.commands import write_json
from norton_deploy.compression.compress import build_classifier, build_detector
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import Complexity, count_complexity
from norton_deploy.errors import UserError
from norton_deploy.files import check_output_file
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import Architecture, ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings
from norton_deploy.models.detectors import DetectorSettings


@dataclass(frozen=True)
class Settings:
    """Settings of tools/complexity.py."""

    task: Literal["box", "mask", "keypoint", "cls"] = "box"
    """Detector (box, mask, keypoint) or classifier (cls)."""
    plan: Path | None = None
    """Plan (YAML); without it only the dense model is counted."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels; 800 800 for detectors, 224 224 (VGG: 32 32) for classifiers."""
    num_classes: int | None = None
    """Classes, a detector's background included; 91, 2 for keypoint, 1000 (VGG: 10) for classifiers."""
    arch: Architecture = "resnet50"
    """Classifier, or ResNet in the detector."""
    proposals: int = 1000
    """Proposals through the box head."""
    detections: int = 0
    """Detections through the mask or keypoint head."""
    json: Path | None = None
    """Write the figures and the list of layers as JSON to a file, or to stdout with '-'."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="complexity", description=__doc__ or "")
    for name, value, least in (
        ("--image-size", None if settings.image_size is None else min(settings.image_size), 1),
        ("--num-classes", settings.num_classes, 1 if settings.task == "cls" else 2),
        ("--proposals", settings.proposals, 0),
        ("--detections", settings.detections, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name}: expected at least {least}, got {value}")
    check_output_file(settings.json, "--json")
    plan = None if settings.plan is None else CompressionPlan.load(settings.plan)
    vgg = settings.arch == "vgg16_bn"
    if settings.task == "cls":
        classifier = ClassifierSettings(settings.arch, settings.num_classes or (10 if vgg else 1000))
        dense, small = build_classifier(classifier), build_classifier(classifier, plan)
        size = settings.image_size or ((32, 32) if vgg else (224, 224))
    else:
        classes = settings.num_classes or (2 if settings.task == "keypoint" else 91)
        detector = DetectorSettings(num_classes=classes, backbone=BackboneSettings(settings.arch))
        dense, small = build_detector(settings.task, detector), build_detector(settings.task, detector, plan)
        size = settings.image_size or (800, 800)
    counts = [
        count_complexity(model, size, proposals=settings.proposals, detections=settings.detections)
        for model in (dense, small)
    ]
    _print_table(*counts)
    before, after = counts
    figures = {
        "task": settings.task,
        "plan": None if settings.plan is None else str(settings.plan),
        "image_size": size,
        "proposals": settings.proposals,
        "detections": settings.detections,
        "macs": after.macs,
        "params": after.params,
        "dense_macs": before.macs,
        "dense_params": before.params,
        "layers": [asdict(layer) for layer in after.layers],
        "dense_layers": [asdict(layer) for layer in before.layers],
    }
    write_json(figures, settings.json)
    return 0


def _print_table(before: Complexity, after: Complexity) -> None:
    """Totals, and below them every layer with MACs."""
    print(f"{'':44}{'MACs':>14}{'parameters':>14}", file=sys.stderr)
    for name, count in (("dense", before), ("compressed", after)):
        print(f"{name:44}{count.macs / 1e9:>12.4f} G{count.params / 1e6:>12.3f} M", file=sys.stderr)
    saved = (1 - after.macs / before.macs, 1 - after.params / before.params)
    print(f"{'reduction':44}{saved[0]:>14.2%}{saved[1]:>14.2%}\n", file=sys.stderr)
    for layer in after.layers:
        if layer.macs:
            print(f"{layer.name:44}{layer.macs / 1e6:>12.2f} M{layer.params:>14,}", file=sys.stderr)

"""Count multiply-accumulate operations (MACs) and parameters, dense and compressed, per layer and in total."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from norton_deploy.checkpoints.torchvision_weights import classifier_settings
from norton_deploy.commands import Output, write_json
from norton_deploy.compression.compress import apply_structure
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import Complexity, count_complexity
from norton_deploy.errors import require_least
from norton_deploy.files import check_output_file
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import Architecture
from norton_deploy.models.detector_parts import BackboneSettings
from norton_deploy.models.detectors import DetectorSettings, ModelSettings


@dataclass(frozen=True)
class Settings(Output):
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="complexity", description=__doc__ or "")
    require_least(1, image_size=None if settings.image_size is None else min(settings.image_size))
    require_least(1 if settings.task == "cls" else 2, num_classes=settings.num_classes)
    require_least(0, proposals=settings.proposals, detections=settings.detections)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    plan = None if settings.plan is None else CompressionPlan.load(settings.plan)
    shape: ModelSettings
    if settings.task == "cls":
        shape = classifier_settings(settings.arch, settings.num_classes)
    else:
        classes = settings.num_classes or (2 if settings.task == "keypoint" else 91)
        shape = DetectorSettings(num_classes=classes, backbone=BackboneSettings(settings.arch))
    dense = shape.build(settings.task)
    size = settings.image_size or shape.input_size
    before, after = (
        count_complexity(model, size, proposals=settings.proposals, detections=settings.detections)
        for model in (dense, dense if plan is None else apply_structure(copy.deepcopy(dense), plan))
    )
    _print_table(before, after)
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

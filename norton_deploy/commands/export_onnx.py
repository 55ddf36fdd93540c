"""norton export_onnx: a detector as one ONNX file that was compared with eager mode, stage by stage."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.commands import Output, write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.image_file import read_image
from norton_deploy.data.image_folder import find_images
from norton_deploy.errors import require_least
from norton_deploy.export.artefact import check_artefact_folder, write_artefact
from norton_deploy.files import check_output_file, refuse_same_file
from norton_deploy.parity.export_checked import SCENES, Export, ExportOptions, export_checked, open_detector
from norton_deploy.parity.verification import reference_path
from norton_deploy.structures import Categories, Task

FIRST = (
    "model",
    "categories",
    "image-size",
    "input-size",
    "precision",
    "calibration",
    "target",
    "images",
    "eval",
    "artefact",
    "overwrite",
)


@dataclass(frozen=True, kw_only=True)
class Settings(ExportOptions, Output):
    """Settings of export_onnx."""

    out: Path
    """The file to write."""
    model: str | None = None
    """Detector: a checkpoint (.safetensors) or torchvision's .pth; without it weights are random."""
    categories: Path | None = None
    """Categories of a .pth file: a COCO annotation file or a list of names, one a line."""
    task: Task | None = None
    """box, mask or keypoint; needed without --model, checked with it."""
    plan: Path | None = None
    """Without --model: compress the random detector by this plan."""
    score_threshold: float | None = None
    """Detections below this score are dropped; by default the model's own threshold."""
    images: tuple[Path, ...] = ()
    """Images (files, folders) to compare on; by default embedded scenes."""
    parity_images: int = SCENES
    """How many images to compare on, at most."""
    eval: Path | None = None
    """Also evaluate AP before and after on the val split of this folder in COCO-2017's layout."""
    eval_limit: int | None = None
    """Evaluate on the first so many images only."""
    artefact: Path | None = None
    """Also make this folder: the graph or engine with its labels, clients in Python and C++, a Triton repository."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export, compare, report."""
    settings = parse_settings(Settings, argv, prog="export_onnx", description=__doc__ or "")
    report = run_export(settings, settings.out).to_dict()
    if settings.artefact is not None:
        write_artefact(settings.artefact, settings.out, overwrite=settings.overwrite)
    write_json(report, settings.json)
    return 0


def run_export(settings: Settings, out: Path) -> Export:
    """Write the checked graph `out`; whatever is wrong with the settings is said before the work."""
    require_least(1, parity_images=settings.parity_images)
    refuse_same_file(out, None if settings.model is None else Path(settings.model))
    check_output_file(out, "--out", ".onnx", overwrite=settings.overwrite)
    check_output_file(reference_path(out), "--out", overwrite=settings.overwrite)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    if settings.artefact is not None:
        check_artefact_folder(settings.artefact, overwrite=settings.overwrite)
    model, task, categories = open_model_of(settings)
    files = [file for path in settings.images for file in find_images(path)]
    dataset = None
    if settings.eval is not None:
        dataset = CocoDetection(settings.eval, "val", task, categories=categories)
    return export_checked(
        model,
        task,
        categories,
        out,
        settings,
        [read_image(file) for file in files[: settings.parity_images]],
        scenes=settings.parity_images,
        dataset=dataset,
        eval_limit=settings.eval_limit,
        report=lambda message: print(message, file=sys.stderr),
    )


def open_model_of(settings: Settings) -> tuple[GeneralizedRCNN, Task, Categories]:
    """The detector that the settings name, see `open_detector`."""
    return open_detector(
        settings.model,
        settings.task,
        plan=settings.plan,
        image_size=settings.image_size,
        score_threshold=settings.score_threshold,
        categories=settings.categories,
    )

"""The model that is deployed, as one checkpoint that knows its categories and image size; and what stands for dense."""

from dataclasses import replace
from pathlib import Path

from norton_deploy.checkpoints.checkpoint import Checkpoint, read_header
from norton_deploy.checkpoints.open_model import MODEL_SUFFIXES, names_no_categories, open_model, with_image_size
from norton_deploy.data.category_list import categories_of_model
from norton_deploy.data.coco_index import annotation_file
from norton_deploy.data.dataset_check import check_layout
from norton_deploy.deployment.making import tool
from norton_deploy.deployment.request import CONFIGURATIONS, DeployRequest
from norton_deploy.detectron2.checkpoint import import_detectron2
from norton_deploy.detectron2.config import read_config
from norton_deploy.errors import UserError
from norton_deploy.inference.loading import PACKAGED_TASKS, packaged_detector
from norton_deploy.structures import Task

UNFACTORED = "the same without factors"
"""Name of what stands for dense where there is no dense original."""
COMPRESSED = (
    "The model is compressed already: nothing was planned, compressed or fine-tuned. It is compared with the same "
    "detector whose decomposed layers are multiplied out to one ordinary convolution each. That changes no result, and "
    "what was pruned away is missing from both, so the speed-up is that of the factors alone; give --baseline to "
    "compare with the original."
)
COMPRESSED_WITH_BASELINE = (
    "The model is compressed already: nothing was planned, compressed or fine-tuned; dense is the given baseline."
)
PACKAGED = (
    "The model is the package's own small detector, trained on drawn scenes, and so are the data: this shows that the "
    "way to an engine works, and says nothing about other models. Its dense original is not in the package; how the "
    "two compare is in the project's docs/results.md (Detectors in the package)."
)


def source_file(request: DeployRequest) -> Path:
    """The model file that was asked for, the packaged one without --model.

    Raises:
        UserError: the file is missing or no model to deploy, or this task has no packaged detector.
    """
    if request.model is not None:
        if not request.model.is_file():
            raise UserError(f"--model {request.model}: no such file")
        if request.model.suffix not in (*MODEL_SUFFIXES, *CONFIGURATIONS):
            raise UserError(
                f"--model {request.model}: expected a checkpoint (.safetensors), torchvision's .pth, or Detectron2's "
                "configuration (.yaml) with its weights in --weights"
            )
        return request.model
    if request.task not in PACKAGED_TASKS:
        raise UserError(f"--task {request.task}: no packaged detector; give --model, or --task {PACKAGED_TASKS[0]}")
    file, here = packaged_detector(request.task), Path.cwd()
    return file.relative_to(here) if file.is_relative_to(here) else file


def is_checkpoint(file: Path) -> bool:
    """Whether it can be used as it is."""
    return file.suffix == ".safetensors"


def open_source(request: DeployRequest, file: Path) -> Checkpoint:
    """Open any kind of model for the images that were asked for.

    Raises:
        UserError: it cannot be read, is no detector, or for another task or image size; or the data are not there.
    """
    categories = request.categories
    if file.suffix in CONFIGURATIONS:
        assert request.weights is not None  # the request was checked
        opened = import_detectron2(file, request.weights, categories or _datas_own(request, read_config(file).task))
    else:
        opened = open_model(str(file), categories=categories)
    task = opened.header.task
    if task == "cls":
        raise UserError(f"{file}: a classifier; detectors are deployed")
    if request.task not in (None, task):
        raise UserError(f"{file}: a detector for task '{task}', --task is '{request.task}'")
    own = _datas_own(request, task)
    if categories is None and names_no_categories(file) and own is not None:
        named = categories_of_model(own, opened.header.detector.num_classes, str(file))
        opened = replace(opened, header=replace(opened.header, categories=named))
    return opened if request.image_size is None else with_image_size(opened, request.image_size)


def import_command(request: DeployRequest, file: Path, annotations: Path, out: Path) -> str:
    """The command that does alone what `open_source` does and writes it; `annotations` are the data's."""
    categories = request.categories or annotations
    if request.weights is not None:
        return tool("import_detectron2", config=file, weights=request.weights, annotations=categories,
                    image_size=request.image_size, out=out)  # fmt: skip
    named = None if is_checkpoint(file) else categories
    return tool("import_model", model=file, out=out, categories=named, image_size=request.image_size)


def _datas_own(request: DeployRequest, task: Task) -> Path | None:
    """The annotations of val, None without data.

    Raises:
        UserError: the data are not in COCO's layout.
    """
    if request.data is None:
        return None
    check_layout(request.data, task)
    return annotation_file(request.data, "val", task)


def own_image_size(request: DeployRequest, file: Path) -> tuple[int, int]:
    """(height, width) that the engine sees: what was asked for, or a square of the detector's short side."""
    side = read_header(file).detector.image.min_size
    return request.image_size or (side, side)


def dense_of(request: DeployRequest, source: Checkpoint) -> tuple[Path | None, str]:
    """For a compressed model: the baseline, None for the model itself multiplied out; and a note for the report.

    Raises:
        UserError: the baseline is not a dense detector of the same task and categories.
    """
    if request.baseline is None:
        if request.target == "torch":
            raise UserError("--target torch: the model is compressed already; give its dense original as --baseline")
        return None, COMPRESSED
    baseline = read_header(request.baseline)
    if baseline.plan is not None:
        raise UserError(f"--baseline {request.baseline}: is compressed itself; give the dense original")
    if (baseline.task, baseline.categories) != (source.header.task, source.header.categories):
        raise UserError(f"--baseline {request.baseline}: another task or other categories than the model")
    return request.baseline, COMPRESSED_WITH_BASELINE

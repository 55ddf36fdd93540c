"""Where a model comes from: an architecture's name, a checkpoint, or torchvision's published weights."""

from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from torch import Tensor
from torchvision.models import ResNet50_Weights, VGG16_BN_Weights, get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, KeypointRCNN_ResNet50_FPN_Weights

from norton_deploy.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointHeader,
    build_structure,
    class_categories,
    load_checkpoint,
    load_weights,
    rebuild,
)
from norton_deploy.checkpoints.torchvision_weights import classifier_settings, current_names, identify, read_tensors
from norton_deploy.data.category_list import categories_of_model, names_no_categories
from norton_deploy.errors import UserError
from norton_deploy.models.classifiers import Architecture
from norton_deploy.models.detectors import ModelSettings
from norton_deploy.structures import Categories, ModelTask

MODEL_SUFFIXES = (".safetensors", ".pth", ".pt")


def open_model(
    model: str,
    weights: str = "none",
    *,
    categories: Path | Categories | None = None,
    image_size: tuple[int, int] | None = None,
) -> Checkpoint:
    """Open what a user names.

    Args:
        model: an architecture (resnet18/34/50/101, vgg16_bn), a checkpoint of this project (.safetensors),
            or a .pth file of torchvision's ResNet, Faster, Mask or Keypoint R-CNN.
        weights: for an architecture: "none" (random), "imagenet" (torchvision's download) or a file.
        categories: of a .pth file, which names none: a COCO annotation file or a list of names (`read_categories`),
            or themselves; a checkpoint has its own.
        image_size: (height, width) in pixels for which a detector shall be: its image settings are replaced.

    Raises:
        UserError: unknown name, unreadable file, weights of another model, or another number of categories.
    """
    if model in get_args(Architecture):
        if categories is not None or image_size is not None:
            raise UserError(f"{model}: --categories and --image-size are for a detector's file")
        return _open_architecture(cast(Architecture, model), weights)
    if weights != "none":
        raise UserError(f"--weights {weights}: only goes with an architecture's name, not with the file {model}")
    if Path(model).suffix not in MODEL_SUFFIXES:
        known = ", ".join(get_args(Architecture))
        raise UserError(f"model '{model}': expected {known}, a .safetensors checkpoint or a .pth file")
    if categories is not None and not names_no_categories(model):
        raise UserError(f"{model}: has its own categories; leave --categories out")
    opened = _open_file(model, categories)
    return opened if image_size is None else with_image_size(opened, image_size)


def open_for_data(path: Path, task: ModelTask, data: Categories, named: Path | None = None) -> tuple[Checkpoint, str]:
    """Open a file for data with these categories: a .pth that names none, but is a detector for this task with as many
    classes, is taken to detect them.

    Args:
        named: the categories of a .pth file, which are then its own.

    Returns:
        the checkpoint, and what was taken for granted, in words ("" where nothing was).
    """
    opened = open_model(str(path), categories=named)
    header = opened.header
    same = header.task == task != "cls" and header.detector.num_classes == data.num_classes
    if named is not None or not names_no_categories(path) or not same or header.categories == data:
        return opened, ""
    note = f" (its {data.num_classes - 1} classes are taken as the data's, in their order: {', '.join(data.names)})"
    return replace(opened, header=replace(header, categories=data)), note


def with_image_size(checkpoint: Checkpoint, image_size: tuple[int, int]) -> Checkpoint:
    """The detector for images of (height, width) pixels: resized so that they fit the shorter and the longer side.

    Raises:
        UserError: a size below 1, or a classifier.
    """
    header, (short, long) = checkpoint.header, sorted(image_size)
    try:
        image = replace(header.detector.image, min_size=short, max_size=long, train_short_sides=())
    except UserError as error:
        raise UserError(f"--image-size {' '.join(map(str, image_size))}: {error}") from error
    changed = replace(header, settings=replace(header.detector, image=image))
    model = build_structure(changed)
    load_weights(model, checkpoint.model.state_dict(), "the model")
    return Checkpoint(model.train(checkpoint.model.training), changed)


def _open_architecture(architecture: Architecture, weights: str) -> Checkpoint:
    if weights in ("none", "imagenet"):
        settings = classifier_settings(architecture)
        model = settings.build()
        if weights == "imagenet":
            load_weights(model.eval(), download_imagenet(architecture), "imagenet weights")
        named = weights == "imagenet"
        return Checkpoint(model, CheckpointHeader("cls", settings, None, _class_names(settings, named)))
    loaded = _open_file(weights)
    task, found = loaded.header.task, loaded.header.settings.architecture
    if task != "cls" or found != architecture:
        raise UserError(f"{weights}: holds {found if task == 'cls' else f'a {task} detector'}, not {architecture}")
    return loaded


def _open_file(path: str, given: Path | Categories | None = None) -> Checkpoint:
    """A checkpoint, or a state_dict of torchvision's."""
    if path.endswith(".safetensors"):
        return load_checkpoint(path)
    tensors = current_names(read_tensors(path))
    try:
        task, settings = identify(tensors, path)
    except UserError as error:  # of settings that no model has
        raise error if path in str(error) else UserError(f"{path}: {error}") from error
    if task == "cls":
        if given is not None:
            raise UserError(f"{path}: a classifier's weights; --categories is for a detector's")
        categories = _class_names(settings, imagenet=settings.num_classes == 1000)
    elif isinstance(given, Path):
        categories = categories_of_model(given, settings.num_classes, path)
    else:
        categories = given or published_categories(task, settings.num_classes)
    if task != "cls" and categories.num_classes != settings.num_classes:
        raise UserError(
            f"{path}: has {settings.num_classes} classes with the background, the categories "
            f"{', '.join(categories.names[:5])} ... are {categories.num_classes}"
        )
    header = CheckpointHeader(task, settings, None, categories)
    return Checkpoint(rebuild(header, tensors, path).eval(), header)


def _class_names(settings: ModelSettings, imagenet: bool) -> Categories:
    """ImageNet's classes, or numbered ones."""
    if imagenet:
        return class_categories(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return class_categories([f"class {index}" for index in range(settings.num_classes)])


def published_categories(task: ModelTask, num_classes: int) -> Categories:
    """COCO's categories where the number of classes is that of torchvision's weights, else numbered ones."""
    weights = KeypointRCNN_ResNet50_FPN_Weights if task == "keypoint" else FasterRCNN_ResNet50_FPN_Weights
    names = weights.DEFAULT.meta["categories"]
    if len(names) == num_classes:
        used = [label for label, name in enumerate(names) if label > 0 and name != "N/A"]
        return Categories(tuple(used), tuple(used), tuple(names[label] for label in used))
    labels = tuple(range(1, num_classes))
    return Categories(labels, labels, tuple(f"class {label}" for label in labels))


def download_imagenet(architecture: Architecture) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, through its own cache and download.

    Raises:
        UserError: torchvision has none for this architecture, or they cannot be fetched.
    """
    if architecture == "vgg16_bn":
        raise UserError(
            f"{VGG16_BN_Weights.__name__} are of the 224 x 224 VGG, not of the CIFAR-10 one; train one with "
            "norton train_cls and give its file to --weights"
        )
    try:
        weights = get_model_weights(architecture)["IMAGENET1K_V1"]
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except Exception as error:
        raise UserError(
            f"--weights imagenet: torchvision could not fetch them ({error}); download the .pth file "
            "elsewhere and give it to --weights"
        ) from error

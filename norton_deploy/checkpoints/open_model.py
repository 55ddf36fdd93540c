"""Where a model comes from: an architecture's name, a checkpoint, or torchvision's published weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from norton_deploy.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointHeader,
    class_categories,
    load_checkpoint,
    load_weights,
    read_tensors,
)
from norton_deploy.checkpoints.published_weights import (
    current_names,
    download_imagenet,
    identify,
    published_categories,
)
from norton_deploy.errors import UserError
from norton_deploy.models.classifiers import Architecture, ClassifierSettings
from norton_deploy.models.detectors import ModelSettings


def open_model(model: str, weights: str = "none") -> Checkpoint:
    """Open what a user names.

    Args:
        model: an architecture (resnet18/34/50/101, vgg16_bn), a checkpoint of this project (.safetensors),
            or a .pth file of torchvision's ResNet, Faster, Mask or Keypoint R-CNN.
        weights: for an architecture: "none" (random), "imagenet" (torchvision's download) or a file.

    Raises:
        UserError: unknown name, unreadable file, or weights of another model.
    """
    if model in get_args(Architecture):
        return _from_architecture(cast(Architecture, model), weights)
    if weights != "none":
        raise UserError(f"--weights {weights}: only goes with an architecture's name, not with the file {model}")
    if Path(model).suffix == ".safetensors":
        return load_checkpoint(model)
    if Path(model).suffix in (".pth", ".pt"):
        return _from_published(model)
    known = ", ".join(get_args(Architecture))
    raise UserError(f"model '{model}': expected {known}, a .safetensors checkpoint or a .pth file")


def _from_architecture(architecture: Architecture, weights: str) -> Checkpoint:
    if weights == "none":
        size = (32, 32) if architecture == "vgg16_bn" else (224, 224)
        settings = ClassifierSettings(
            architecture, num_classes=10 if architecture == "vgg16_bn" else 1000, image_size=size
        )
        return Checkpoint(settings.build(), _classifier_header(settings, _numbered(settings)))
    if weights == "imagenet":
        settings = ClassifierSettings(architecture)
        model = settings.build()
        load_weights(model, download_imagenet(architecture), "imagenet weights")
        return Checkpoint(model.eval(), _classifier_header(settings, _imagenet_names()))
    loaded = load_checkpoint(weights) if weights.endswith(".safetensors") else _from_published(weights)
    found = loaded.header.settings
    if loaded.header.task != "cls" or found.architecture != architecture:
        name = found.architecture if loaded.header.task == "cls" else f"a {loaded.header.task} detector"
        raise UserError(f"{weights}: holds {name}, not {architecture}")
    return loaded


def _from_published(path: str) -> Checkpoint:
    tensors = current_names(read_tensors(path))
    task, settings = identify(tensors, path)
    if task == "cls":
        categories = class_categories(_imagenet_names() if settings.num_classes == 1000 else _numbered(settings))
    else:
        categories = published_categories(task, settings.num_classes)
    model = settings.build(task)
    load_weights(model, tensors, path)
    return Checkpoint(model.eval(), CheckpointHeader(task, settings, None, categories))


def _classifier_header(settings: ClassifierSettings, names: Sequence[str]) -> CheckpointHeader:
    return CheckpointHeader("cls", settings, None, class_categories(names))


def _numbered(settings: ModelSettings) -> list[str]:
    return [f"class {index}" for index in range(settings.num_classes)]


def _imagenet_names() -> list[str]:
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])

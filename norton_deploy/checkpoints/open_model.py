"""Where a model comes from: an architecture's name, a checkpoint, or torchvision's published weights."""

from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from torch import Tensor
from torchvision.models import ResNet50_Weights, VGG16_BN_Weights, get_model_weights
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)

from norton_deploy.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointHeader,
    class_categories,
    load_checkpoint,
    load_weights,
    read_tensors,
)
from norton_deploy.errors import UserError
from norton_deploy.models.classifiers import Architecture, ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings, ModelSettings
from norton_deploy.structures import Categories, ModelTask

_RESNET_DEPTHS: dict[tuple[int, bool], Architecture] = {
    (2, False): "resnet18",
    (6, False): "resnet34",
    (6, True): "resnet50",
    (23, True): "resnet101",
}
# The statistics of torchvision's published detectors are used without an epsilon.
_PUBLISHED_DETECTORS = (
    FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    KeypointRCNN_ResNet50_FPN_Weights.COCO_V1,
    KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY,
)
_PUBLISHED_FILES = tuple(weights.url.rpartition("/")[2] for weights in _PUBLISHED_DETECTORS)


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
        return _open_architecture(cast(Architecture, model), weights)
    if weights != "none":
        raise UserError(f"--weights {weights}: only goes with an architecture's name, not with the file {model}")
    if Path(model).suffix in (".safetensors", ".pth", ".pt"):
        return _open_file(model)
    known = ", ".join(get_args(Architecture))
    raise UserError(f"model '{model}': expected {known}, a .safetensors checkpoint or a .pth file")


def classifier_settings(architecture: Architecture, num_classes: int | None = None) -> ClassifierSettings:
    """Settings of an architecture as it is usual: of 1000 classes at 224 x 224, VGG of 10 at 32 x 32."""
    if architecture == "vgg16_bn":
        return ClassifierSettings(architecture, num_classes or 10, image_size=(32, 32))
    return ClassifierSettings(architecture, num_classes or 1000)


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


def _open_file(path: str) -> Checkpoint:
    """A checkpoint, or a state_dict of torchvision's."""
    if path.endswith(".safetensors"):
        return load_checkpoint(path)
    tensors = current_names(read_tensors(path))
    task, settings = identify(tensors, path)
    if task == "cls":
        categories = _class_names(settings, imagenet=settings.num_classes == 1000)
    else:
        categories = published_categories(task, settings.num_classes)
    model = settings.build(task)
    load_weights(model, tensors, path)
    return Checkpoint(model.eval(), CheckpointHeader(task, settings, None, categories))


def _class_names(settings: ModelSettings, imagenet: bool) -> Categories:
    """ImageNet's classes, or numbered ones."""
    if imagenet:
        return class_categories(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return class_categories([f"class {index}" for index in range(settings.num_classes)])


def identify(tensors: dict[str, Tensor], source: str) -> tuple[ModelTask, ModelSettings]:
    """What torchvision model a state_dict is of, from its names and shapes.

    Returns:
        (task, settings). Numbers that a state_dict cannot show (thresholds, anchors, image size) are torchvision's
        defaults; the epsilon of frozen BatchNorm is 0 for the files that torchvision publishes, which are known by
        their names, and 1e-5 otherwise.

    Raises:
        UserError: it is of none of the supported models.
    """
    if "fc.weight" in tensors and "layer4.0.conv1.weight" in tensors:
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layer3."))
        key = (depth, "layer1.0.conv3.weight" in tensors)
        if key in _RESNET_DEPTHS:
            return "cls", classifier_settings(_RESNET_DEPTHS[key], len(tensors["fc.weight"]))
    if "features.0.weight" in tensors and "classifier.3.weight" in tensors and "features.1.weight" in tensors:
        return "cls", classifier_settings("vgg16_bn", len(tensors["classifier.3.weight"]))
    if "roi_heads.box_predictor.cls_score.weight" not in tensors:
        first = next(iter(tensors), "none")
        raise UserError(
            f"{source}: weights of an unknown model (first tensor: {first}); expected torchvision's ResNet, "
            "Faster, Mask or Keypoint R-CNN R50-FPN, or this project's VGG-16-BN"
        )
    settings = DetectorSettings(
        num_classes=len(tensors["roi_heads.box_predictor.cls_score.weight"]),
        backbone=BackboneSettings(
            fpn_channels=len(tensors["backbone.fpn.inner_blocks.0.0.weight"]),
            norm_eps=0.0 if Path(source).name in _PUBLISHED_FILES else 1e-5,
        ),
        roi=RoiSettings(box_features=len(tensors["roi_heads.box_head.fc6.weight"])),
    )
    if "roi_heads.mask_predictor.conv5_mask.weight" in tensors:
        return "mask", settings
    if "roi_heads.keypoint_predictor.kps_score_lowres.weight" in tensors:
        points = tensors["roi_heads.keypoint_predictor.kps_score_lowres.weight"].shape[1]
        return "keypoint", replace(settings, num_keypoints=points)
    return "box", settings


def current_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's older layer names in today's form (its first COCO weights have them)."""
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        parent, _, last = stem.rpartition(".")
        if stem == "rpn.head.conv":
            stem = "rpn.head.conv.0.0"
        elif parent == "roi_heads.mask_head" and last.startswith("mask_fcn"):
            stem = f"{parent}.{int(last.removeprefix('mask_fcn')) - 1}.0"
        elif parent in ("backbone.fpn.inner_blocks", "backbone.fpn.layer_blocks"):
            stem = f"{stem}.0"
        renamed[f"{stem}.{kind}"] = tensor
    return renamed


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
            "tools/train_cls.py and give its file to --weights"
        )
    try:
        weights = get_model_weights(architecture)["IMAGENET1K_V1"]
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except Exception as error:
        raise UserError(
            f"--weights imagenet: torchvision could not fetch them ({error}); download the .pth file "
            "elsewhere and give it to --weights"
        ) from error

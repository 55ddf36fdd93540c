"""torchvision's published weights: what a plain state_dict belongs to, and where to get it."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torchvision.models import VGG16_BN_Weights
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
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


def identify(tensors: dict[str, Tensor], source: str) -> tuple[ModelTask, ModelSettings]:
    """What torchvision model a state_dict is of, from its names and shapes.

    Returns:
        (task, settings). Numbers that a state_dict cannot show (thresholds,
        anchors, image size) are torchvision's defaults; the epsilon of frozen BatchNorm is 0 for the files that
        torchvision publishes, which are known by their names, and 1e-5 otherwise.

    Raises:
        UserError: it is of none of the supported models.
    """
    if "fc.weight" in tensors and "layer4.0.conv1.weight" in tensors:
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layer3."))
        key = (depth, "layer1.0.conv3.weight" in tensors)
        if key in _RESNET_DEPTHS:
            return "cls", ClassifierSettings(_RESNET_DEPTHS[key], num_classes=len(tensors["fc.weight"]))
    if "features.0.weight" in tensors and "classifier.3.weight" in tensors and "features.1.weight" in tensors:
        classes = len(tensors["classifier.3.weight"])
        return "cls", ClassifierSettings("vgg16_bn", num_classes=classes, image_size=(32, 32))
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
    import torchvision

    if architecture == "vgg16_bn":
        raise UserError(
            f"{VGG16_BN_Weights.__name__} are of the 224 x 224 VGG, not of the CIFAR-10 one; train one with "
            "tools/train_cls.py and give its file to --weights"
        )
    try:
        weights = torchvision.models.get_model_weights(architecture)["IMAGENET1K_V1"]
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except Exception as error:
        raise UserError(
            f"--weights imagenet: torchvision could not fetch them ({error}); download the .pth file "
            "elsewhere and give it to --weights"
        ) from error

"""state_dicts of others, read without running any code, and which torchvision model one is of, by names and shapes."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)

from norton_deploy.errors import UserError, shown
from norton_deploy.models.classifiers import Architecture, ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings, ModelSettings
from norton_deploy.structures import ModelTask

_RESNET_DEPTHS: dict[tuple[int, bool], Architecture] = {
    (2, False): "resnet18",
    (6, False): "resnet34",
    (6, True): "resnet50",
    (23, True): "resnet101",
}
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every name."""
# The statistics of torchvision's published detectors are used without an epsilon.
_PUBLISHED_DETECTORS = (
    FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    KeypointRCNN_ResNet50_FPN_Weights.COCO_V1,
    KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY,
)
_PUBLISHED_FILES = tuple(weights.url.rpartition("/")[2] for weights in _PUBLISHED_DETECTORS)
_V2_MARK = "backbone.fpn.inner_blocks.0.1.weight"  # BatchNorm in the pyramid


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth file (loaded without running any code) or of a .safetensors file.

    A .pth file may hold the state_dict itself or a mapping with it under "model", "state_dict" or "model_state_dict".

    Raises:
        UserError: the file is missing, broken, or would need code to load.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _refuse_packed(Path(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision's training scripts store theirs
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        told = re.split("trusted source.|WeightsUnpickler error: ", str(error))[-1]  # before it, advice to run it
        reason = f"({' '.join(told.split())[:300] or type(error).__name__})"
        if foreign is not None:
            reason = (
                f"but a pickle of {foreign[1]}, which would run as code; open it where it was made and save its "
                "weights alone: torch.save(model.state_dict(), 'weights.pth')"
            )
        raise UserError(f"{path}: not a file of plain tensors {reason}") from error
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(map(_is_plain, content.values())):
        raise UserError(f"{path}: expected a mapping of tensors (a state_dict)")
    if strange := [name for name in content if not isinstance(name, str)]:
        raise UserError(f"{path}: a state_dict's names are texts, found {shown(strange[0])}")
    return dict(content)


def _is_plain(value: object) -> bool:
    """A tensor in memory, with each of its elements stored (a view can claim any size)."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return not value.is_quantized and value.nbytes <= value.untyped_storage().nbytes()


def _refuse_packed(path: Path) -> None:
    """torch stores its files' entries as they are; compressed ones can grow to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError("has compressed entries, as torch never writes them")


def classifier_settings(architecture: Architecture, num_classes: int | None = None) -> ClassifierSettings:
    """Settings of an architecture as it is usual: of 1000 classes at 224 x 224, VGG of 10 at 32 x 32."""
    if architecture == "vgg16_bn":
        return ClassifierSettings(architecture, num_classes or 10, image_size=(32, 32))
    return ClassifierSettings(architecture, num_classes or 1000)


def identify(tensors: Mapping[str, Tensor], source: str) -> tuple[ModelTask, ModelSettings]:
    """What torchvision model a state_dict is of, from its names (`current_names`) and shapes.

    Returns:
        (task, settings). Numbers that a state_dict cannot show (thresholds, anchors, image size) are torchvision's
        defaults; the epsilon of frozen BatchNorm is 0 for the files that torchvision publishes, which are known by
        their names, and 1e-5 otherwise.

    Raises:
        UserError: it is of none of the supported models; the message says which it is, where it can be told.
    """
    if "fc.weight" in tensors and (architecture := _resnet(tensors, "")):
        return "cls", classifier_settings(architecture, _rows(tensors, "fc.weight", source))
    if {"features.0.weight", "features.1.weight", "classifier.3.weight"} <= tensors.keys():
        return "cls", classifier_settings("vgg16_bn", _rows(tensors, "classifier.3.weight", source))
    body = _resnet(tensors, "backbone.body.")
    if "roi_heads.box_predictor.cls_score.weight" not in tensors or _V2_MARK in tensors or body is None:
        raise UserError(f"{source}: {_what_it_is(tensors)}; {SUPPORTED}")
    settings = DetectorSettings(
        num_classes=_rows(tensors, "roi_heads.box_predictor.cls_score.weight", source),
        backbone=BackboneSettings(
            architecture=body,
            fpn_channels=_rows(tensors, "backbone.fpn.inner_blocks.0.0.weight", source),
            norm_eps=0.0 if Path(source).name in _PUBLISHED_FILES else 1e-5,
        ),
        roi=RoiSettings(box_features=_rows(tensors, "roi_heads.box_head.fc6.weight", source)),
    )
    if "roi_heads.mask_predictor.conv5_mask.weight" in tensors:
        return "mask", settings
    if "roi_heads.keypoint_predictor.kps_score_lowres.weight" in tensors:
        points = _rows(tensors, "roi_heads.keypoint_predictor.kps_score_lowres.weight", source, axis=1)
        return "keypoint", replace(settings, num_keypoints=points)
    return "box", settings


SUPPORTED = (
    "expected torchvision's ResNet, its Faster, Mask or Keypoint R-CNN with ResNet and FPN (fasterrcnn_resnet50_fpn "
    "and so on), or this project's VGG-16-BN"
)


def _what_it_is(tensors: Mapping[str, Tensor]) -> str:
    """In words, of weights that are not supported."""
    if _V2_MARK in tensors:
        return "weights of a torchvision _v2 detector, whose pyramid and heads this version cannot compress"
    if "head.classification_head.cls_logits.weight" in tensors or "head.classification_head.conv.0.weight" in tensors:
        return "weights of a one-stage detector (RetinaNet or FCOS), and only two-stage ones are compressed"
    if any(name.startswith("backbone.bottom_up.") for name in tensors):
        return "weights of Detectron2; bring them in with norton import_detectron2"
    if "roi_heads.box_predictor.cls_score.weight" in tensors:
        return "weights of a two-stage detector on another backbone"
    return f"weights of an unknown model (first tensor: {next(iter(tensors), 'none')})"


def _rows(tensors: Mapping[str, Tensor], name: str, source: str, axis: int = 0) -> int:
    """How long a tensor is along an axis."""
    if name not in tensors:
        raise UserError(f"{source}: the tensor '{name}' is missing; {SUPPORTED}")
    if tensors[name].ndim <= axis:
        raise UserError(f"{source}: tensor '{name}' has shape {tuple(tensors[name].shape)}; {SUPPORTED}")
    return int(tensors[name].shape[axis])


def _resnet(tensors: Mapping[str, Tensor], prefix: str) -> Architecture | None:
    """The ResNet whose layers have this prefix, if it is one of the four."""
    blocks = {name.removeprefix(prefix).split(".")[1] for name in tensors if name.startswith(f"{prefix}layer3.")}
    is_stem = tensors.get(f"{prefix}conv1.weight")
    if is_stem is None or not blocks:
        return None
    return _RESNET_DEPTHS.get((len(blocks), f"{prefix}layer1.0.conv3.weight" in tensors))


def current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers (`WRAPPERS`), and torchvision's older layer names in today's form (its first
    COCO weights have them)."""
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return current_names({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        parent, _, last = stem.rpartition(".")
        if stem == "rpn.head.conv":
            stem = "rpn.head.conv.0.0"
        elif parent == "roi_heads.mask_head" and (layer := re.fullmatch(r"mask_fcn([1-9])", last)):
            stem = f"{parent}.{int(layer[1]) - 1}.0"
        elif parent in ("backbone.fpn.inner_blocks", "backbone.fpn.layer_blocks"):
            stem = f"{stem}.0"
        renamed[f"{stem}.{kind}"] = tensor
    return renamed

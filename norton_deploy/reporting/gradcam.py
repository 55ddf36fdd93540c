"""Grad-CAM (Selvaraju et al., 2017) of a dense model and its compressed forms: do they look at the same places?

All models explain the same score: a classifier's logit of the class that the dense model predicts, or a detector's
class logit of one given box, which every model pools from its own features.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_iou

from norton_deploy.checkpoints.checkpoint import Checkpoint
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.compression.channel_groups import is_detector
from norton_deploy.compression.fit_plan import BODY
from norton_deploy.errors import UserError

DENSE = "dense"
STAGES = ("layer2", "layer3", "layer4")
SHARED_IOU = 0.5
INSTALL = (
    "Grad-CAM needs two more steps: pip install 'norton-deploy[explain]', then pip install --no-deps grad-cam "
    "(with its dependencies it would put opencv-python-headless over opencv-python, and windows would be gone)"
)
Map = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Question:
    """What the models are asked about one image.

    Attributes:
        pixels: float32 [1, 3, H, W], normalised and padded as the models take it.
        picture: the same image to look at, float32 [h, w, 3] RGB in 0..1, without the padding.
        label: class index of a classifier, label of a detector.
        box: [1, 4] xyxy in pixels of `picture`; None for a classifier.
    """

    pixels: Tensor
    picture: npt.NDArray[np.float32]
    label: int
    box: Tensor | None = None


class BoxLogits(nn.Module):
    """A detector as a classifier of one box: normalised images [1, 3, H, W] -> class logits [1, classes]."""

    def __init__(self, detector: nn.Module, box: Tensor, image_size: tuple[int, int]) -> None:
        """
        Args:
            detector: two-stage detector in evaluation mode.
            box: [1, 4] xyxy in pixels of the input.
            image_size: (height, width) of the image inside the padding.
        """
        super().__init__()
        self.detector: Any = detector
        self.box, self.image_size = box, image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Class logits of the box."""
        heads = self.detector.roi_heads
        maps = self.detector.backbone(pixels)
        logits: Tensor = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, [self.box], [self.image_size])))[0]
        return logits


def explained_layers(model: nn.Module) -> list[str]:
    """Three levels of a model by default: the last stages of a ResNet, the stages before VGG's last three poolings."""
    if is_detector(model):
        return [BODY + stage for stage in STAGES]
    if hasattr(model, "layer4"):
        return list(STAGES)
    names = [name for name, _ in model.get_submodule("features").named_children()]
    before = [
        first
        for first, second in pairwise(names)
        if isinstance(model.get_submodule(f"features.{second}"), nn.MaxPool2d)
    ]
    return [f"features.{name}" for name in [*before, names[-1]][-3:]]


def ask_detector(detectors: Sequence[nn.Module], image: Tensor, box: Box | None = None) -> Question | None:
    """A box of an image and what is in it.

    Args:
        detectors: in evaluation mode, the dense one first.
        image: float32 [3, H, W] in 0..1 RGB.
        box: xyxy in pixels of `image`; its label is the dense detector's best. Without it, the detection that all
            detectors share (same label, IoU of at least 0.5 with the dense one's box) whose lowest score is highest.

    Returns:
        The question, or None when no detection is shared.
    """
    dense: Any = detectors[0]
    with torch.no_grad():
        prepared, _ = dense.transform([image])
        height, width = (int(side) for side in prepared.image_sizes[0])
        found = None if box is not None else shared_detection(detectors, image)
        if box is None and found is None:
            return None
        at = torch.tensor([box]) if found is None else found[0]
        at = resize_boxes(at, list(image.shape[1:]), [height, width])
        logits = BoxLogits(dense, at, (height, width))(prepared.tensors)
    label = int(logits[0, 1:].argmax()) + 1 if found is None else found[1]
    inside = prepared.tensors[0, :, :height, :width]
    picture = _picture(inside, dense.transform.image_mean, dense.transform.image_std)
    return Question(prepared.tensors, picture, label, at)


def _picture(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """Normalised pixels [3, H, W] as a picture [H, W, 3] in 0..1."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()


def shared_detection(detectors: Sequence[nn.Module], image: Tensor) -> tuple[Tensor, int] | None:
    """Box [1, 4] (the dense detector's) and label of the best detection that all detectors make of an image."""
    dense, *others = (detector([image])[0] for detector in detectors)
    lowest = dense["scores"].clone()
    for other in others:
        same = (box_iou(dense["boxes"], other["boxes"]) >= SHARED_IOU) & (dense["labels"][:, None] == other["labels"])
        scores = torch.cat([torch.where(same, other["scores"], 0.0), torch.zeros(len(lowest), 1)], dim=1)
        lowest = torch.minimum(lowest, scores.max(dim=1).values)
    if len(lowest) == 0 or float(lowest.max()) == 0:
        return None
    best = int(lowest.argmax())
    return dense["boxes"][best : best + 1], int(dense["labels"][best])


def gradcam_maps(model: nn.Module, question: Question, layers: Sequence[str]) -> dict[str, Map]:
    """Layer -> Grad-CAM of the question's score, [h, w] in 0..1, in the picture's pixels.

    Raises:
        UserError: grad-cam is not installed, or the model has no such layer.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise UserError(f"{INSTALL}; missing: {error.name}") from error
    height, width = question.picture.shape[:2]
    scored = model if question.box is None else BoxLogits(model, question.box, (height, width))
    known = dict(model.named_modules())
    maps = {}
    for layer in layers:
        if layer not in known:
            raise UserError(f"--layers: the model has no layer '{layer}'; for example {explained_layers(model)[-1]}")
        cam = GradCAM(scored, [known[layer]])
        # With a gradient at the input, frozen first layers have one too.
        pixels = question.pixels.clone().requires_grad_()
        maps[layer] = np.asarray(cam(pixels, [ClassifierOutputTarget(question.label)])[0, :height, :width], np.float32)
        cam.activations_and_grads.release()
    model.zero_grad(set_to_none=True)
    return maps


def map_correlation(first: Map, second: Map) -> float | None:
    """Pearson's correlation of two maps over their pixels; None when one of them is constant."""
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


@dataclass(frozen=True)
class GradcamComparison:
    """What `compare_gradcam` found.

    Attributes:
        skipped: how many were not, because the detectors share no detection in them.
        correlation: compressed model -> layer -> mean and standard deviation of the correlations with the dense
            model's maps (None without any), and their number: maps that are constant have none.
        rows: of the first images the question, the name of its class, and model -> layer -> map.
    """

    images: int
    skipped: int
    correlation: dict[str, dict[str, dict[str, Any]]]
    rows: list[tuple[Question, str, dict[str, dict[str, Map]]]]


def open_compared(dense: Path, compressed: Sequence[Path]) -> dict[str, Checkpoint]:
    """A dense model and its compressed forms, by their names in the picture.

    Raises:
        UserError: they are not of one task with the same categories, or two have the same name.
    """
    models = {DENSE: open_model(str(dense))}
    for path in compressed:
        name = path.stem if path.stem not in ("last", "best") else path.parent.name
        if name in models:
            raise UserError(f"--compressed {path}: a second model named '{name}'; rename the file or its folder")
        models[name] = open_model(str(path))
        own, expected = models[name].header, models[DENSE].header
        if (own.task, own.categories) != (expected.task, expected.categories):
            raise UserError(f"--compressed {path}: is a {own.task} model of other categories than {dense}")
    return models


def compare_gradcam(
    models: Mapping[str, Checkpoint],
    images: Iterable[Tensor],
    *,
    layers: Sequence[str] = (),
    box: Box | None = None,
    rows: int = 5,
) -> GradcamComparison:
    """Map the same score in all models, image by image, and correlate the maps with the dense model's.

    Args:
        images: float32 [3, H, W] in 0..1 RGB.
        layers: names of the layers to map; by default `explained_layers`.
        box: of detectors, the box to explain; by default the best detection that all share.
        rows: images to keep the maps of, at most.

    Raises:
        UserError: no image could be explained, a box does not fit, or see `gradcam_maps`.
    """
    dense = models[DENSE]
    layers = list(layers) or explained_layers(dense.model)
    names = dict(zip(dense.header.categories.labels, dense.header.categories.names, strict=True))
    shown: list[tuple[Question, str, dict[str, dict[str, Map]]]] = []
    found: dict[str, dict[str, list[float]]] = {name: {layer: [] for layer in layers} for name in models}
    asked = skipped = 0
    for image in images:
        question = _ask(models, image, box)
        if question is None:
            skipped += 1
            continue
        asked += 1
        maps = {name: gradcam_maps(checkpoint.model, question, layers) for name, checkpoint in models.items()}
        for name, layer in ((name, layer) for name in models for layer in layers):
            correlation = map_correlation(maps[DENSE][layer], maps[name][layer])
            found[name][layer] += [] if correlation is None else [correlation]
        if len(shown) < rows:
            shown.append((question, names[question.label + (question.box is None)], maps))
    if asked == 0:
        raise UserError(f"Grad-CAM: the models share no detection in {skipped} images; give an image and --box")
    correlations = {
        name: {layer: _summary(values) for layer, values in levels.items()}
        for name, levels in found.items()
        if name != DENSE
    }
    return GradcamComparison(asked, skipped, correlations, shown)


def _ask(models: Mapping[str, Checkpoint], image: Tensor, box: Box | None) -> Question | None:
    """What the models are to explain in an image: of classifiers the class that the dense one predicts."""
    dense = models[DENSE]
    if dense.header.task == "cls":
        if box is not None:
            raise UserError("--box: goes with detectors, not with a classifier")
        settings = dense.header.classifier
        pixels = settings.prepare([image]).tensors
        with torch.no_grad():
            label = int(dense.model(pixels).argmax())
        return Question(pixels, _picture(pixels[0], settings.image_mean, settings.image_std), label)
    if box is not None:
        (left, top, right, bottom), (height, width) = box, image.shape[-2:]
        if not (max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)):
            raise UserError(f"--box {box}: covers nothing of the image, which has {width} x {height} pixels")
    return ask_detector([checkpoint.model for checkpoint in models.values()], image, box)


def _summary(correlations: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and number."""
    mean = round(float(np.mean(correlations)), 4) if correlations else None
    std = round(float(np.std(correlations)), 4) if correlations else None
    return {"mean": mean, "std": std, "maps": len(correlations)}

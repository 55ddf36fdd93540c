"""Distillation: a student learns from the dense model that it was compressed from.

Detectors imitate features after PKD (Cao et al., NeurIPS 2022). The student's pyramid is to correlate with that of its
teacher, channel by channel: both are standardised over the batch and all positions, and the squared difference of the
standardised maps is minimised, which is one minus Pearson's correlation. Magnitudes do not matter, only patterns. The
teacher's channels are the student's, so no layer has to translate between them. Their heads
imitate the teacher's answers about the same proposals (head_imitation.py).

Classifiers learn the teacher's softened class scores (G. Hinton, O. Vinyals, J. Dean: Distilling the knowledge in a
neural network, 2015).
"""

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.checkpoints.open_model import open_for_data
from norton_deploy.data.category_list import names_no_categories
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Categories, Task
from norton_deploy.training.batches import Batch
from norton_deploy.training.head_imitation import HeadImitation

VARIANCE_FLOOR = 1e-7
"""Keeps the gradient of a channel that hardly varies within the size of the others'."""
SUBSAMPLED_LEVEL = "pool"
"""The pyramid's top level, every second cell of the one below it: nothing new to imitate."""
SHARED_FIELDS = (
    "image.min_size",
    "image.max_size",
    "image.mean",
    "image.std",
    "detectron2.image_resize",
    "detectron2.box_delta_weights",
)
"""Settings without which the two see other pixels or mean other boxes by the same numbers."""


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus Pearson's correlation over batch and positions, averaged over the channels.

    Args:
        student, teacher: feature maps [N, C, H, W].

    Returns:
        Scalar in 0..2, float32. A channel that is constant in both counts 0, one that is constant in one of them 0.5.
    """
    return 0.5 * (standardised(student) - standardised(teacher)).square().mean()


def standardised(features: Tensor) -> Tensor:
    """Feature maps [N, C, H, W] as rows [C, N * H * W] of mean 0 and variance 1 (0 for a constant row), float32."""
    rows = features.float().transpose(0, 1).flatten(1)
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows * torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + VARIANCE_FLOOR)


class DetectorImitation:
    """A detector's own losses and the imitation of its teacher, as `loss_terms` of a `Trainer`.

    The teacher sees the very tensor that the student's backbone sees, so images are transformed (and scale jitter is
    drawn) once. It is in evaluation mode and has no gradient. Under several processes the correlations are those of
    each process's own images.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        channels: Tensor | None,
        *,
        pyramid_weight: float = 0.0,
        head_weight: float = 0.0,
    ) -> None:
        """
        Args:
            student: the detector in training, without a wrapper around it.
            teacher: the dense detector, on the student's device; it is frozen.
            channels: the teacher's pyramid channels that the student's are, int64 [C]; None when it has all.
            pyramid_weight: factor of the sum of `correlation_loss` over the pyramid's levels; 0 leaves it out.
            head_weight: factor of every loss of `HeadImitation`; 0 leaves them out.
        """
        self.student_backbone = student.get_submodule("backbone")
        self.teacher = teacher.requires_grad_(False).eval()
        self.channels, self.pyramid_weight, self.head_weight = channels, pyramid_weight, head_weight
        self.heads = HeadImitation(student, teacher)

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """torchvision's losses, "imitation" of the pyramid and those of the heads, each a scalar; `model` is the
        student, wrapped or not."""
        seen: list[tuple[Tensor, dict[str, Tensor]]] = []

        def remember(_module: nn.Module, inputs: tuple[Tensor, ...], maps: dict[str, Tensor]) -> None:
            seen.append((inputs[0], maps))

        handle = self.student_backbone.register_forward_hook(remember)
        try:
            with self.heads.watching():
                losses = dict(model(batch.images, batch.targets))
        finally:
            handle.remove()
        [(pixels, maps)] = seen
        with torch.no_grad():
            wanted = self.teacher.get_submodule("backbone")(pixels)
        if self.pyramid_weight:
            losses["imitation"] = self.pyramid_weight * self._pyramid(maps, wanted)
        if self.head_weight:
            losses |= {name: self.head_weight * loss for name, loss in self.heads.losses(wanted).items()}
        return losses

    def _pyramid(self, maps: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        terms = []
        for level, features in maps.items():
            if level == SUBSAMPLED_LEVEL:
                continue
            target = wanted[level] if self.channels is None else wanted[level][:, self.channels]
            terms.append(correlation_loss(features, target))
        return torch.stack(terms).sum()


def open_detector_teacher(
    path: Path,
    student: nn.Module,
    settings: DetectorSettings,
    plan: CompressionPlan | None,
    pyramid_channels: tuple[int, ...] | None,
    *,
    task: Task,
    categories: Categories,
    named: Path | None = None,
) -> tuple[nn.Module, Tensor | None]:
    """Open the detector that a student is to imitate: a dense one, or one that was compressed as the student was.

    Args:
        path: its checkpoint (.safetensors, or torchvision's .pth).
        pyramid_channels: which of the dense pyramid's channels the student has (`CheckpointHeader`).
        named: the categories of a .pth file, where they are not the training's (`open_for_data`).

    Returns:
        The teacher, and the channels [C] (int64) of its pyramid that are the student's, None when all are.

    Raises:
        UserError: it is compressed otherwise than the student, or task, categories, image settings or the pyramid's
            width differ; the message names the field.
    """
    teacher, _ = open_for_data(path, task, categories, named if names_no_categories(path) else None)
    header = teacher.header
    if header.task != task:
        raise UserError(f"--teacher {path}: task is {header.task}, the student's is {task}")
    if header.plan is not None:
        if header.plan != plan:
            raise UserError(f"--teacher {path}: plan: it is compressed otherwise than the student; give the dense one")
        pyramid_channels = None  # its pyramid is as narrow as the student's
    if header.categories != categories:
        raise UserError(
            f"--teacher {path}: categories are {', '.join(header.categories.names)}; the student's are "
            f"{', '.join(categories.names)} (labels and ids must agree too)"
        )
    for field in SHARED_FIELDS:
        own, wanted = (attrgetter(field)(found) for found in (header.detector, settings))
        if own != wanted:
            raise UserError(f"--teacher {path}: {field} is {own}, the student's is {wanted}")
    backbones: Any = [detector.get_submodule("backbone") for detector in (student, teacher.model)]
    width, wide = (backbone.out_channels for backbone in backbones)
    if pyramid_channels is None and width != wide:
        raise UserError(
            f"--teacher {path}: fpn_channels is {wide}, the student's pyramid has {width} channels, and its checkpoint "
            "does not say which; compress the dense detector with norton compress and start from that file (--init)"
        )
    if pyramid_channels is not None and max(pyramid_channels) >= wide:
        raise UserError(
            f"--teacher {path}: fpn_channels is {wide}, but the student has channel {max(pyramid_channels)} of its "
            "dense original's pyramid; give the detector that it was compressed from"
        )
    return teacher.model, None if pyramid_channels is None else torch.tensor(pyramid_channels)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch.

    The factor T^2 keeps the gradient's size independent of the temperature.

    Args:
        student, teacher: logits [N, K].
        temperature: T > 0.
    """
    divergence = functional.kl_div(
        functional.log_softmax(student.float() / temperature, dim=1),
        functional.log_softmax(teacher.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


class DistilledClassification:
    """Loss terms (1 - w) cross-entropy + w distillation of a classifier's step, whose sum is minimised.

    Args:
        teacher: trained classifier; it is put in evaluation mode and not trained.
        weight: w, 0..1.
        temperature: T > 0.
    """

    def __init__(self, teacher: nn.Module, *, weight: float, temperature: float, smoothing: float = 0.0) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight, self.temperature, self.smoothing = weight, temperature, smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Terms of the batch: "classification" and "distillation", scalars."""
        logits = model(batch.images)
        with torch.no_grad():
            target = self.teacher(batch.images)
        hard = functional.cross_entropy(logits, batch.targets, label_smoothing=self.smoothing)
        soft = distillation_loss(logits, target, self.temperature)
        return {"classification": (1 - self.weight) * hard, "distillation": self.weight * soft}


def open_classifier_teacher(path: Path, classes: tuple[str, ...], student: ClassifierSettings) -> nn.Module:
    """The classifier in a checkpoint, as a teacher of these classes (names in the order of the labels).

    Raises:
        UserError: the file holds a detector, or other classes, or wants colours normalised otherwise.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.header.task != "cls":
        raise UserError(f"--teacher {path}: holds a {checkpoint.header.task} detector, expected a classifier")
    found = checkpoint.header.categories.names
    if found != classes:
        raise UserError(
            f"--teacher {path}: knows the classes {', '.join(found[:4])}, ... ({len(found)}), the data has "
            f"{', '.join(classes[:4])}, ... ({len(classes)}); they must be the same, in the same order"
        )
    for field in ("image_mean", "image_std"):
        wanted, own = getattr(checkpoint.header.settings, field), getattr(student, field)
        if wanted != own:
            raise UserError(f"--teacher {path}: {field} is {wanted}, the student's is {own}")
    return checkpoint.model

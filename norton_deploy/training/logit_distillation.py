"""Distillation of a classifier from its dense original: the student learns the teacher's softened class scores.

G. Hinton, O. Vinyals, J. Dean: Distilling the knowledge in a neural network, 2015.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.errors import UserError
from norton_deploy.training.batch import Batch


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
        smoothing: label smoothing of the cross-entropy.
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


def load_teacher(path: Path, classes: tuple[str, ...]) -> nn.Module:
    """The classifier in a checkpoint, as a teacher of these classes (names in the order of the labels).

    Raises:
        UserError: the file holds a detector, or other classes.
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
    return checkpoint.model

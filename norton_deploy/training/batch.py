"""What the loop and its callers hand each other: batches, the loader of them, evaluations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device


@dataclass(frozen=True)
class Batch:
    """What one process sees in one step.

    Attributes:
        images: what the model takes: a list of [3, H, W] for a detector, [N, 3, H, W] for a classifier.
        targets: a list of dictionaries for a detector, class indices [N] for a classifier.
        image_ids: what names the N images to a person: COCO ids or file names.
    """

    images: Any
    targets: Any
    image_ids: Sequence[int | str]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        images, targets = send_to_device((self.images, self.targets), device, non_blocking=True)
        return Batch(images, targets, self.image_ids)


class EpochLoader(Protocol):
    """Data of one process: the same batches for the same epoch, from any batch on."""

    def __len__(self) -> int:
        """Batches of one epoch, equal on all processes."""

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """The batches of an epoch from `first_batch` on."""


@dataclass(frozen=True)
class Evaluation:
    """Attributes: metrics, one dictionary for each measure; score, the one number that is to rise."""

    metrics: dict[str, dict[str, float]]
    score: float

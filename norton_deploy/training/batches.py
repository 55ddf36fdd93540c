"""Batches of a dataset for the training loop, from any batch of any epoch on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset

from norton_deploy.data.loading import GroupedBatchSampler, iterate
from norton_deploy.training.settings import TrainingSettings


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


class EpochDataset(Protocol):
    """A dataset whose item i depends on (its seed, the epoch, i) alone."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class SampledBatches:
    """The batches that a sampler makes of a dataset (an `EpochLoader`).

    Args:
        dataset: images and targets.
        sampler: which of them make this process's batches.
        collate: list of the dataset's items -> Batch.
        workers: processes that read them.
    """

    def __init__(
        self,
        dataset: EpochDataset,
        sampler: GroupedBatchSampler,
        collate: Callable[[list[Any]], Batch],
        workers: int,
    ) -> None:
        self.dataset, self.sampler, self.collate, self.workers = dataset, sampler, collate, workers

    @classmethod
    def of(
        cls,
        dataset: EpochDataset,
        collate: Callable[[list[Any]], Batch],
        settings: TrainingSettings,
        accelerator: Accelerator,
        *,
        image_sizes: npt.ArrayLike | None = None,
    ) -> "SampledBatches":
        """A process's share of a dataset; `image_sizes` [images, 2] are for batches of alike aspect ratio."""
        sampler = GroupedBatchSampler(
            len(dataset),
            settings.batch_size,
            image_sizes=image_sizes,
            seed=settings.seed,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
        )
        return cls(dataset, sampler, collate, settings.workers)

    def __len__(self) -> int:
        return len(self.sampler)

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """The batches of an epoch from `first_batch` on; workers start anew, so that they know the epoch."""
        self.dataset.set_epoch(epoch)
        self.sampler.set_epoch(epoch, first_batch)
        as_dataset: Dataset[Any] = self.dataset  # type: ignore[assignment]  # not torch's class, but its methods
        loader = DataLoader(as_dataset, batch_sampler=self.sampler, collate_fn=self.collate, num_workers=self.workers)
        yield from iterate(loader)


def collate_detections(items: list[Any]) -> Batch:
    """[(image, target)] -> Batch with lists, as torchvision's detectors take them."""
    images, targets = zip(*items, strict=True)
    return Batch(list(images), list(targets), [target["image_id"] for target in targets])


def collate_classes(items: list[Any]) -> Batch:
    """[(image, label, name)] -> Batch with images [N, 3, H, W] and labels [N]."""
    images, labels, names = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), list(names))

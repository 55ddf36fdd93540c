"""Batches of a dataset for the training loop, from any batch of any epoch on."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from norton_deploy.data.loading import iterate
from norton_deploy.data.samplers import GroupedBatchSampler
from norton_deploy.training.batch import Batch


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

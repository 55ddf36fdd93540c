"""Batches of a dataset for the training loop: grouped by aspect ratio, shared out to processes, resumable anywhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils.pin_memory import pin_memory

from norton_deploy.data.resident_images import Augmentation, ResidentImages
from norton_deploy.data.transforms import to_unit_range
from norton_deploy.errors import UserError, one_line_errors
from norton_deploy.training.settings import TrainingSettings
from norton_deploy.training.stop_signals import outlive_one_stop

# Width : height from 1:2 to 2:1 in six equal steps of its logarithm, as in torchvision's reference training.
ASPECT_EDGES = 2.0 ** np.linspace(-1.0, 1.0, 7)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """What one process sees in one step.

    Attributes:
        images: a list of [3, H, W] for a detector, uint8 or float32, [N, 3, H, W] for a classifier.
        targets: a list of dictionaries for a detector, class indices [N] for a classifier.
        image_ids: what names the N images to a person: COCO ids or file names.
    """

    images: Any
    targets: Any
    image_ids: Sequence[int | str]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`, where bytes become float32 0..1: a quarter of it crosses."""
        images, targets = send_to_device((self.images, self.targets), device, non_blocking=True)
        if isinstance(images, list):
            images = [to_unit_range(image) for image in images]
        return Batch(images, targets, self.image_ids)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which it crosses to a GPU while others compute."""
        images, targets = pin_memory((self.images, self.targets))
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


class GroupedBatchSampler(Sampler[list[int]]):
    """Batches of one process, the same for the same (seed, epoch) wherever and whenever they are made.

    Every epoch is first cut into batches of `batch_size * processes` images, alike in aspect ratio so that
    little of a padded batch is padding; what a group has left over is joined across groups, in order of
    aspect ratio. Batch k of process r is the r-th part of batch k of all, hence two processes together see in
    every step what one process with the doubled batch size sees. Each image comes once per epoch; only the
    last of the cut batches is filled up, with less than one batch of images from the start of the order.

    Args:
        count: number of images, at least 1.
        image_sizes: [count, 2] heights and widths for grouping; None groups nothing.
        processes, rank: how many processes share the epoch, and which of them this one is.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        image_sizes: npt.ArrayLike | None = None,
        seed: int = 0,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        if count < 1 or batch_size < 1:
            raise UserError(f"sampler: expected at least 1 image and batch size 1, got {count} and {batch_size}")
        if not 0 <= rank < processes:
            raise ValueError(f"rank {rank} is not one of {processes} processes")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.processes, self.rank = processes, rank
        self.epoch, self.first_batch = 0, 0
        ratio = np.ones(count)
        if image_sizes is not None:
            sizes = np.asarray(image_sizes, dtype=float)
            if sizes.shape != (count, 2):
                raise ValueError(f"image_sizes: expected shape ({count}, 2), got {sizes.shape}")
            ratio = sizes[:, 1] / sizes[:, 0]
        self._ratio = ratio
        self._group = np.digitize(ratio, ASPECT_EDGES)

    @classmethod
    def of(
        cls,
        count: int,
        settings: TrainingSettings,
        accelerator: Accelerator,
        *,
        image_sizes: npt.ArrayLike | None = None,
    ) -> "GroupedBatchSampler":
        """Of a run's settings, for this process."""
        return cls(
            count,
            settings.batch_size,
            image_sizes=image_sizes,
            seed=settings.seed,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
        )

    def __len__(self) -> int:
        """Batches of a whole epoch, equal on all processes, whatever `first_batch` is."""
        return -(-self.count // (self.batch_size * self.processes))

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it that iteration starts from (to resume within an epoch)."""
        self.epoch, self.first_batch = epoch, first_batch

    def epoch_batches(self) -> Indices:
        """All batches of all processes in the current epoch, [len(self), processes * batch_size]."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.count)
        size = self.batch_size * self.processes
        whole: list[Indices] = []
        rest: list[Indices] = []
        for group in np.unique(self._group):
            members = order[self._group[order] == group]
            cut = len(members) - len(members) % size
            whole.append(members[:cut].reshape(-1, size))
            rest.append(members[cut:])
        left = np.concatenate(rest)
        left = left[np.argsort(self._ratio[left], kind="stable")]
        missing = -len(left) % size
        left = np.concatenate([left, np.resize(order, missing)])
        batches = np.concatenate([*whole, left.reshape(-1, size)])
        return batches[rng.permutation(len(batches))]

    def __iter__(self) -> Iterator[list[int]]:
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for batch in self.epoch_batches()[self.first_batch :, mine]:
            yield [int(index) for index in batch]


class SampledBatches:
    """The batches that a sampler makes of a dataset (an `EpochLoader`).

    Args:
        sampler: which of them make this process's batches.
        collate: list of the dataset's items -> Batch.
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
        loader = DataLoader(
            as_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_one_stop,
        )
        yield from one_line_errors(loader)


class ResidentBatches:
    """The batches that a sampler makes of images in memory, augmented where they lie (an `EpochLoader`).

    Args:
        images: on the device of the training.
        settings, accelerator: give the share of this process.
    """

    def __init__(
        self, images: ResidentImages, settings: TrainingSettings, accelerator: Accelerator, *, cutout: int = 0
    ) -> None:
        self.images, self.seed, self.cutout = images, settings.seed, cutout
        self.sampler = GroupedBatchSampler.of(len(images), settings, accelerator)

    def __len__(self) -> int:
        return len(self.sampler)

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """The batches of an epoch from `first_batch` on."""
        self.sampler.set_epoch(epoch, first_batch)
        augmented = Augmentation(self.images, self.seed, epoch, cutout=self.cutout)
        for indices in self.sampler:
            chosen = torch.tensor(indices, device=self.images.labels.device)
            names = [self.images.names[index] for index in indices]
            yield Batch(self.images.normalised(augmented(chosen)), self.images.labels[chosen], names)


def collate_detections(items: list[Any]) -> Batch:
    """[(image, target)] -> Batch with lists, as torchvision's detectors take them."""
    images, targets = zip(*items, strict=True)
    return Batch(list(images), list(targets), [target["image_id"] for target in targets])


def collate_classes(items: list[Any]) -> Batch:
    """[(image, label, name)] -> Batch with images [N, 3, H, W] and labels [N]."""
    images, labels, names = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), list(names))

"""Which images make which batch (grouped by aspect ratio, shared out to processes, resumable), and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Sampler

from norton_deploy.errors import UserError

# Width : height from 1:2 to 2:1 in six equal steps of its logarithm, as in torchvision's reference training.
ASPECT_EDGES = 2.0 ** np.linspace(-1.0, 1.0, 7)

Indices = npt.NDArray[np.int64]


class GroupedBatchSampler(Sampler[list[int]]):
    """Batches of one process, the same for the same (seed, epoch) wherever and whenever they are made.

    Every epoch is first cut into batches of `batch_size * processes` images, alike in aspect ratio so that
    little of a padded batch is padding; what a group has left over is joined across groups, in order of
    aspect ratio. Batch k of process r is the r-th part of batch k of all, hence two processes together see in
    every step what one process with the doubled batch size sees. Each image comes once per epoch; only the
    last of the cut batches is filled up, with less than one batch of images from the start of the order.

    Args:
        count: number of images, at least 1.
        batch_size: images per batch and process.
        image_sizes: [count, 2] heights and widths for grouping; None groups nothing.
        seed: of the order.
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


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches.

    Raises:
        UserError: as the dataset raised it; torch would put a worker's whole traceback into its message.
    """
    try:
        yield from loader
    except UserError as error:
        last_line = str(error).strip().splitlines()[-1]
        raise UserError(last_line.rpartition(f"{UserError.__name__}: ")[2]) from None

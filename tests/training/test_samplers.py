"""The batch sampler's promises: every image once, equal counts, groups, process split, resume."""

from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from norton_deploy.errors import UserError
from norton_deploy.training.batches import ASPECT_EDGES, GroupedBatchSampler

SIZES = np.random.default_rng(0).integers(100, 300, (103, 2))


def epoch_of(sampler: GroupedBatchSampler, epoch: int, first: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch, first)
    return list(sampler)


@pytest.mark.parametrize("count", [1, 3, 96, 103])
@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (2, 2), (8, 1), (3, 4)])
def test_every_image_once_plus_less_than_a_batch(count: int, batch_size: int, processes: int) -> None:
    parts = [
        GroupedBatchSampler(count, batch_size, image_sizes=SIZES[:count], processes=processes, rank=rank, seed=3)
        for rank in range(processes)
    ]
    batches = [epoch_of(part, 5) for part in parts]
    whole = batch_size * processes
    assert {len(own) for own in batches} == {len(parts[0])} == {-(-count // whole)}
    assert all(len(batch) == batch_size for own in batches for batch in own)
    seen = Counter(index for own in batches for batch in own for index in batch)
    assert set(seen) == set(range(count))
    assert seen.total() - count == -count % whole < whole


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_what_one_sees(processes: int) -> None:
    one = epoch_of(GroupedBatchSampler(103, 8, image_sizes=SIZES, seed=1), 2)
    many = [
        epoch_of(
            GroupedBatchSampler(103, 8 // processes, image_sizes=SIZES, seed=1, processes=processes, rank=r),
            2,
        )
        for r in range(processes)
    ]
    assert one == [[index for part in parts for index in part] for parts in zip(*many, strict=True)]


def test_batches_are_alike_in_aspect_ratio() -> None:
    groups = np.digitize(SIZES[:, 1] / SIZES[:, 0], ASPECT_EDGES)
    batches = epoch_of(GroupedBatchSampler(103, 4, image_sizes=SIZES), 0)
    mixed = sum(len(set(groups[batch])) > 1 for batch in batches)
    assert mixed <= len(set(groups))  # at most what the groups leave over
    plain = epoch_of(GroupedBatchSampler(103, 4), 0)
    assert sum(len(set(groups[batch])) > 1 for batch in plain) > 2 * mixed


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sampler = GroupedBatchSampler(103, 4, image_sizes=SIZES, seed=1)
    assert epoch_of(sampler, 0) == epoch_of(sampler, 0)
    assert epoch_of(sampler, 0) != epoch_of(sampler, 1)
    assert epoch_of(sampler, 0) != epoch_of(GroupedBatchSampler(103, 4, image_sizes=SIZES, seed=2), 0)


def test_resuming_within_an_epoch_continues_it() -> None:
    sampler = GroupedBatchSampler(103, 4, image_sizes=SIZES, seed=1)
    whole = epoch_of(sampler, 3)
    assert epoch_of(sampler, 3, first=11) == whole[11:]
    assert len(sampler) == len(whole)  # the length stays that of the epoch


def test_serves_a_data_loader() -> None:
    sampler = GroupedBatchSampler(10, 4, seed=1)
    batches = [batch.tolist() for batch in DataLoader(list(range(10)), batch_sampler=sampler)]
    assert batches == list(sampler)


def test_rejects_nonsense() -> None:
    with pytest.raises(UserError, match="at least 1 image"):
        GroupedBatchSampler(0, 4)
    with pytest.raises(ValueError, match="rank 2"):
        GroupedBatchSampler(5, 4, processes=2, rank=2)
    with pytest.raises(ValueError, match="expected shape"):
        GroupedBatchSampler(5, 4, image_sizes=SIZES)

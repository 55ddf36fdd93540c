import pytest
import torch

from norton_deploy.errors import UserError
from norton_deploy.training.batches import GroupedBatchSampler, SampledBatches, collate_classes


class Numbers:
    """Item i of epoch e is the image e + i / 100 of class i."""

    def __init__(self, bad: int | None = None) -> None:
        self.epoch, self.bad = 0, bad

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        if index == self.bad:
            raise UserError(f"/data/{index}.jpg: truncated; repair it")
        return torch.full((1, 1, 1), self.epoch + index / 100), index, f"{index}.jpg"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_continues_where_it_stopped(workers):
    whole = SampledBatches(Numbers(), GroupedBatchSampler(10, 2, seed=4), collate_classes, workers)
    assert len(whole) == 5
    batches = list(whole.batches(3, 0))
    rest = list(whole.batches(3, 2))
    assert len(whole) == 5 and len(rest) == 3
    for batch, again in zip(batches[2:], rest, strict=True):
        assert torch.equal(batch.images, again.images) and batch.image_ids == again.image_ids
        assert torch.equal(batch.images.flatten(), 3 + batch.targets / 100)
    assert sorted(name for batch in batches for name in batch.image_ids) == [f"{i}.jpg" for i in range(10)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_one_line_whoever_reads_it(workers):
    loader = SampledBatches(Numbers(bad=7), GroupedBatchSampler(10, 2), collate_classes, workers)
    with pytest.raises(UserError) as error:
        list(loader.batches(0, 0))
    assert str(error.value) == "/data/7.jpg: truncated; repair it"

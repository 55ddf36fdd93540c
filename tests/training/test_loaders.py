import multiprocessing
import signal
import subprocess

import pytest
import torch

from norton_deploy.data.resident_images import Augmentation, ResidentImages
from norton_deploy.errors import UserError
from norton_deploy.training.batches import (
    Batch,
    GroupedBatchSampler,
    ResidentBatches,
    SampledBatches,
    collate_classes,
)
from norton_deploy.training.settings import TrainingSettings, build_accelerator


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


def test_an_epoch_of_resident_images_continues_where_it_stopped(tmp_path):
    pixels, names = torch.randint(0, 256, (10, 16, 16, 3), dtype=torch.uint8), [str(index) for index in range(10)]
    images = ResidentImages(pixels, torch.arange(10), tuple(names), names, torch.zeros(3), torch.ones(3))
    settings = TrainingSettings(out=tmp_path, steps=1, batch_size=4, seed=4, device="cpu")
    accelerator = build_accelerator(settings)
    whole, again = (ResidentBatches(images, settings, accelerator, cutout=4) for _ in range(2))
    assert len(whole) == 3
    batches, rest = list(whole.batches(3, 0)), list(again.batches(3, 1))
    assert len(batches) == 3 and len(rest) == 2
    for batch, other in zip(batches[1:], rest, strict=True):
        assert torch.equal(batch.images, other.images) and batch.image_ids == other.image_ids
    for batch in batches:
        chosen = batch.targets
        assert batch.image_ids == [str(label) for label in chosen.tolist()]
        expected = Augmentation(images, 4, 3, cutout=4)(chosen).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(batch.images, expected)
    assert {name for batch in batches for name in batch.image_ids} == set(names)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_one_line_whoever_reads_it(workers):
    loader = SampledBatches(Numbers(bad=7), GroupedBatchSampler(10, 2), collate_classes, workers)
    with pytest.raises(UserError) as error:
        list(loader.batches(0, 0))
    assert str(error.value) == "/data/7.jpg: truncated; repair it"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_readers_outlive_a_stop_that_reaches_them_too(stop):
    others = multiprocessing.active_children()
    batches = SampledBatches(Numbers(), GroupedBatchSampler(10, 2), collate_classes, 1).batches(0, 0)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - set(others)
    subprocess.run(["kill", f"-{stop.value}", str(reader.pid)], check=True)  # not by the training itself
    assert len(list(batches)) == 4
    assert not reader.is_alive()


def test_the_second_stop_ends_readers():
    others = multiprocessing.active_children()
    batches = SampledBatches(Numbers(), GroupedBatchSampler(10, 2), collate_classes, 1).batches(0, 0)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - set(others)
    stops = 0
    while reader.is_alive() and stops < 50:
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(reader.pid)], check=True)
        stops += 1
        reader.join(0.2)
    assert 1 < stops < 50


def test_readers_end_when_the_training_ends_them():
    others = multiprocessing.active_children()
    batches = SampledBatches(Numbers(), GroupedBatchSampler(10, 2), collate_classes, 1).batches(0, 0)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - set(others)
    reader.terminate()
    reader.join(10)
    assert not reader.is_alive()


def test_bytes_cross_from_pinned_memory_and_are_divided_on_the_device(monkeypatch):
    """A fake of page-locked memory: there is none without a GPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor.dtype) or tensor.clone())
    images = [torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1), torch.rand(3, 2, 2)]
    batch = Batch(images, [{"boxes": torch.ones(1, 4), "image_id": 7}], [7]).pin_memory()
    assert pinned == [torch.uint8, torch.float32, torch.float32] and batch.image_ids == [7]
    crossed = batch.to(torch.device("cpu"))
    assert crossed.images[0].flatten().tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert torch.equal(crossed.images[1], images[1]) and crossed.targets[0]["image_id"] == 7

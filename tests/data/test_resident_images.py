"""Resident images: their pixels, epochs that a loop over pixels confirms, and CIFAR-10's binary version."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from norton_deploy.data import resident_images
from norton_deploy.data.resident_images import Augmentation, ResidentImages, read_class_names, read_resident_images
from norton_deploy.errors import UserError
from tests.class_images import write_class_images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
RECORD = 1 + 3 * 32 * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 12 x 10 JPEGs, three in train/, two in test/."""
    classes = {"cat": None, "dog": None}
    root = tmp_path_factory.mktemp("images")
    return write_class_images(root, {"train": 3, "test": 2}, classes, shape=(12, 10), suffix=".jpg")


def in_memory(pixels: torch.Tensor, mean: tuple[float, ...] = MEAN) -> ResidentImages:
    count = len(pixels)
    names = tuple(map(str, range(count)))
    return ResidentImages(pixels, torch.arange(count), names, names, torch.tensor(mean), torch.tensor(STD))


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_the_files_normalised_channels_last(folder: Path, workers: int) -> None:
    images = read_resident_images(folder, "val", image_size=(12, 10), mean=MEAN, std=STD, workers=workers)
    assert images.names == ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 0, 1, 1]
    found = images.normalised(images.pixels)
    for name, image in zip(images.names, found, strict=True):
        pixels = np.array(Image.open(folder / "test" / name), np.float64) / 255
        np.testing.assert_allclose(image, ((pixels - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_other_sizes_are_resized_as_pillow_does(folder: Path) -> None:
    images = read_resident_images(folder, "train", image_size=(8, 6), mean=MEAN, std=STD)
    expected = np.array(Image.open(folder / "train/cat/0.jpg").resize((6, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(images.pixels[0], expected)


def test_an_epoch_is_crops_and_mirror_images_of_the_reflected_images() -> None:
    count, height, width, border = 60, 16, 17, 2
    images = in_memory(torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8))
    found = Augmentation(images, 3, 1)(torch.arange(count))
    seen = set()
    for pixels, crop in zip(images.pixels, found.numpy(), strict=True):
        wide = np.pad(pixels.numpy(), ((border, border), (border, border), (0, 0)), mode="reflect")
        matches = {
            (top, left, mirrored)
            for top in range(2 * border + 1)
            for left in range(2 * border + 1)
            for mirrored in (False, True)
            if np.array_equal(crop, wide[top : top + height, left : left + width][:, :: -1 if mirrored else 1])
        }
        assert len(matches) == 1
        seen |= matches
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(2 * border + 1))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


@pytest.mark.parametrize("cutout", [0, 4])
def test_an_image_depends_on_seed_epoch_and_index_alone(cutout: int) -> None:
    images = in_memory(torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8))
    whole = Augmentation(images, 0, 5, cutout=cutout)(torch.arange(9))
    again = Augmentation(images, 0, 5, cutout=cutout)
    for index in (7, 0, 3):  # whatever the batch and its order
        assert torch.equal(again(torch.tensor([2, index]))[1], whole[index])
    for seed, epoch in ((0, 6), (1, 5)):
        assert not torch.equal(Augmentation(images, seed, epoch, cutout=cutout)(torch.arange(9)), whole)


def test_a_cut_out_is_a_square_of_the_mean_colour() -> None:
    images = in_memory(torch.zeros(30, 16, 16, 3, dtype=torch.uint8), mean=(0.2, 0.4, 0.6))
    found = Augmentation(images, 0, 0, cutout=4)(torch.arange(30))
    cut = (found == torch.tensor([51, 102, 153])).all(dim=-1)
    assert cut.sum((1, 2)).max() == 16
    for mask in cut:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns) > 0
        assert max(len(rows), len(columns)) <= 4


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """CIFAR-10's binary version with two records a file."""
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (2, RECORD), dtype=np.uint8)
        records[:, 0] = (2, 0)
        (tmp_path / name).write_bytes(records.tobytes())
    (tmp_path / "batches.meta.txt").write_text("ant\nbee\ncat\n\n")
    return tmp_path


def test_the_binary_version_is_read(binary: Path) -> None:
    train = read_resident_images(binary, "train", image_size=(32, 32), mean=MEAN, std=STD)
    assert len(train) == 10 and train.classes == read_class_names(binary) == ("ant", "bee", "cat")
    assert train.names[3] == "data_batch_2.bin:1"
    test = read_resident_images(binary, "val", image_size=(32, 32), mean=MEAN, std=STD, classes=("cat", "bee", "ant"))
    assert test.labels.tolist() == [0, 2]
    record = np.frombuffer((binary / "test_batch.bin").read_bytes(), np.uint8)[:RECORD]
    red, green, blue = record[1:].reshape(3, 32, 32)
    assert np.array_equal(test.pixels[0], np.stack([red, green, blue], axis=-1))


def test_mistakes_are_named(binary: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(**more: object) -> ResidentImages:
        return read_resident_images(binary, "val", **{"image_size": (32, 32), "mean": MEAN, "std": STD, **more})  # type: ignore[arg-type]

    with pytest.raises(UserError, match="images have 32 x 32 px, not 16 x 16"):
        read(image_size=(16, 16))
    with pytest.raises(UserError, match="the class 'bee' is not one of the 2"):
        read(classes=("ant", "cat"))
    (binary / "batches.meta.txt").write_text("ant")
    with pytest.raises(UserError, match=r"test_batch\.bin: label 2, but there are 1 classes"):
        read()
    (binary / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"test_batch\.bin: 100 bytes are no whole records"):
        read()
    (binary / "test_batch.bin").unlink()
    with pytest.raises(UserError, match="cannot read CIFAR-10's binary version"):
        read()
    monkeypatch.setattr(resident_images.os, "sysconf", lambda name: 40)
    with pytest.raises(UserError, match="more than half of this machine's memory; --style imagenet"):
        read_resident_images(folder, "train", image_size=(12, 10), mean=MEAN, std=STD)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_one_line(tmp_path: Path, workers: int) -> None:
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^[^\n]*a\.jpg: not a picture[^\n]*$"):
        read_resident_images(tmp_path, "train", image_size=(8, 8), mean=MEAN, std=STD, workers=workers)

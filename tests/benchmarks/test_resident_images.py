"""Resident images: the pixels of the folder loader, and epochs that a loop over pixels confirms."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.lib.resident_images import ResidentImages, normalised, read_resident_images
from norton_deploy.data.classification import ClassificationFolder
from norton_deploy.errors import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 12 x 10 JPEGs, three in train/, two in test/."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.jpg")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_and_labels_are_those_of_the_folder_loader(folder: Path, workers: int) -> None:
    sets = read_resident_images(folder, workers=workers)
    for split in ("train", "val"):
        reference = ClassificationFolder(folder, split, style="cifar", image_size=(12, 10), mean=MEAN, std=STD)
        reference.transform.transforms[:] = [  # without augmentation
            step for step in reference.transform.transforms if not type(step).__name__.startswith("Random")
        ]
        images = torch.stack([item[0] for item in reference])
        found = normalised(sets[split].pixels, torch.tensor(MEAN), torch.tensor(STD))
        torch.testing.assert_close(found.contiguous(), images)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert sets[split].labels.tolist() == reference.labels.tolist()
        assert sets[split].classes == reference.classes


def test_an_archive_holds_the_same(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.tar.xz"
    with tarfile.open(archive, "w:xz") as stream:
        stream.add(folder / "test", "test")
        stream.add(folder / "train", "train")
    one, other = read_resident_images(folder), read_resident_images(archive)
    for split in ("train", "val"):
        assert torch.equal(one[split].pixels, other[split].pixels)
        assert torch.equal(one[split].labels, other[split].labels)
    assert len(read_resident_images(archive, per_class=2)["train"]) == 4


def test_an_epoch_is_crops_and_mirror_images_of_the_reflected_images() -> None:
    count, height, width, border = 40, 6, 7, 2
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    images = ResidentImages(pixels, torch.arange(count), tuple(map(str, range(count))))
    found, labels = images.epoch(3, 1, border=border)
    assert sorted(labels.tolist()) == list(range(count)) and labels.tolist() != list(range(count))
    seen = set()
    for crop, label in zip(found.numpy(), labels.tolist(), strict=True):
        wide = np.pad(pixels[label].numpy(), ((border, border), (border, border), (0, 0)), mode="reflect")
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


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    images = ResidentImages(torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8), torch.arange(9), ("a",) * 9)
    first, again = images.epoch(0, 5), images.epoch(0, 5)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for other in (images.epoch(0, 6), images.epoch(1, 5)):
        assert not torch.equal(first[0], other[0])


def test_a_cut_out_is_a_square_of_the_mean_colour() -> None:
    pixels = torch.zeros(30, 16, 16, 3, dtype=torch.uint8)
    pixels[:, ::2] = 200  # mean 100
    found, _ = ResidentImages(pixels, torch.arange(30), ("a",) * 30).epoch(0, 0, cutout=4)
    cut = (found == 100).all(dim=-1)
    assert cut.sum((1, 2)).max() == 16
    for mask in cut:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns) > 0
        assert max(len(rows), len(columns)) <= 4


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images for 'train'"):
        read_resident_images(tmp_path)
    (tmp_path / "not.tar").write_text("x")
    with pytest.raises(UserError, match="neither a folder nor a tar archive"):
        read_resident_images(tmp_path / "not.tar")
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.jpg: not a picture"):
        read_resident_images(tmp_path)
    for index, size in enumerate((8, 9)):
        Image.new("RGB", (size, 8)).save(tmp_path / "train" / "cat" / f"{'ab'[index]}.jpg")
    with pytest.raises(UserError, match="same size"):
        read_resident_images(tmp_path)

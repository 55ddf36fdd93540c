"""Class folders and object crops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from norton_deploy.data.classification import (
    ClassificationFolder,
    classification_transform,
    crop_square,
    list_class_files,
    write_crops,
)
from norton_deploy.errors import UserError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """train/ with cat and dog, test/ with dog only, 20 x 30 px pictures."""
    rng = np.random.default_rng(0)
    for split, name, count in (("train", "cat", 3), ("train", "dog", 2), ("test", "dog", 2)):
        (tmp_path / split / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def open_folder(root: Path, split: Any, image_size: tuple[int, int] = (20, 30), seed: int = 0) -> ClassificationFolder:
    transform = classification_transform(split, image_size, MEAN, STD)
    return ClassificationFolder(list_class_files(root, split), transform, seed=seed)


def test_labels_come_from_the_training_classes(folders: Path) -> None:
    train, test = open_folder(folders, "train"), open_folder(folders, "val")
    assert train.files.classes == test.files.classes == ("cat", "dog")
    assert train.files.labels.tolist() == [0, 0, 0, 1, 1]
    assert test.files.labels.tolist() == [1, 1]  # a split without cats does not turn dogs into class 0
    assert test.files.names == ["dog/0.png", "dog/1.png"]


def test_augmentation_depends_on_seed_epoch_and_index_alone(folders: Path) -> None:
    train = open_folder(folders, "train", seed=1, image_size=(16, 16))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [train[index][0] for index in range(5)]
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    torch.rand(10)
    assert all(torch.equal(train[index][0], first[index]) for index in (4, 0, 2))
    assert all(image.shape == (3, 16, 16) for image in first)
    train.set_epoch(1)
    assert any(not torch.equal(train[index][0], first[index]) for index in range(5))


def test_imagenet_evaluation_takes_the_middle(folders: Path) -> None:
    Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(folders / "test/dog/0.png")
    image, label, _ = open_folder(folders, "val", image_size=(28, 28))[0]
    assert type(image) is torch.Tensor and image.shape == (3, 28, 28) and label == 1
    assert torch.allclose(image, torch.tensor((128 / 255 - 0.5) / 0.25), atol=1e-5)


def test_complaints_name_the_folder(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder train/; expected .*train/CLASS"):
        open_folder(tmp_path / "nowhere", "train")
    (folders / "test/dog/0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"dog/0\.png: not a picture"):
        open_folder(folders, "val")[0]
    (folders / "test/horse").mkdir()
    with pytest.raises(UserError, match="the class 'horse' is not one of the 2"):
        open_folder(folders, "val")
    (folders / "val").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        open_folder(folders, "val")
    (folders / "val/dog").mkdir()
    with pytest.raises(UserError, match="no images"):
        open_folder(folders, "val")


def test_crop_is_centred_and_mirrored_at_the_border() -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[10:30, 10:30] = 255
    crop = crop_square(picture, np.array([10, 10, 30, 30], np.float32), 23)  # 20 px times 1.15
    assert crop.shape == (23, 23, 3)
    assert (crop[2:21, 2:21] == 255).all() and (crop[0] == 0).all() and (crop[:, -1] == 0).all()
    corner = crop_square(np.full((40, 40, 3), 7, np.uint8), np.array([0, 0, 10, 30], np.float32), 16)
    assert (corner == 7).all()


def test_crops_of_a_dataset_become_class_folders(tiny_coco: Path, tmp_path: Path) -> None:
    counts = write_crops(tiny_coco, tmp_path / "crops", 32)
    train = open_folder(tmp_path / "crops", "train", image_size=(32, 32))
    assert set(train.files.classes) <= {"person", "stop_sign", "umbrella", "sports_ball", "kite", "clock"}
    assert len(train) == counts["train"] > 5
    assert train[0][0].shape == (3, 32, 32)
    assert sum(1 for _ in (tmp_path / "crops/val").rglob("*.jpg")) == counts["val"]
    with pytest.raises(UserError, match="holds something already"):
        write_crops(tiny_coco, tmp_path / "crops")
    with pytest.raises(UserError, match="px or larger"):
        write_crops(tiny_coco, tmp_path / "none", smallest_side=1000)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["/etc", "../..", ".", "a\0b", "x" * 300, "käse/brot", "..\\..", "%2E"])
def test_no_category_leads_out_of_the_folder(hand_made: Any, tmp_path: Path, name: str) -> None:
    hand_made.categories[0]["name"] = name
    del hand_made.annotations[-1]  # less than a pixel wide
    write_crops(hand_made.write(), tmp_path / "crops")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "crops"]
    assert sorted(path.name for path in (tmp_path / "crops").iterdir()) == ["train", "val"]
    assert len(open_folder(tmp_path / "crops", "train", image_size=(8, 8)).files.classes) == 2


def test_categories_that_would_share_a_folder(hand_made: Any, tmp_path: Path) -> None:
    hand_made.categories[0]["name"] = "sports_ball"
    del hand_made.annotations[-1]  # less than a pixel wide
    with pytest.raises(UserError, match="two categories would share the folder 'sports_ball'"):
        write_crops(hand_made.write(), tmp_path / "crops")
    hand_made.categories[0]["name"] = ""
    with pytest.raises(UserError, match=r"instances_train2017\.json: category id 1: needs a 'name'"):
        write_crops(hand_made.write(), tmp_path / "crops")

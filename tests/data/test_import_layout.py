"""YOLO's and Pascal VOC's layouts come in with the same boxes."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from norton_deploy.commands import run
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.import_layout import import_dataset
from norton_deploy.errors import UserError

SIDES = ("xmin", "ymin", "xmax", "ymax")
BOX = (10, 20, 50, 60)  # xyxy in an image of 100 x 80 pixels


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((80, 100, 3), value, np.uint8))


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    (tmp_path / "data.yaml").write_text("names: [bolt, nut]\n")
    for split, kind in (("train", 0), ("val", 1)):
        picture(tmp_path / "images" / split / "a.png", 40 + kind)
        labels = tmp_path / "labels" / split / "a.txt"
        labels.parent.mkdir(parents=True)
        labels.write_text(f"{kind} 0.3 0.5 0.4 0.5\n")
    return tmp_path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (tmp_path / "Annotations").mkdir()
    for split, name, kind in (("train", "t", "nut"), ("val", "v", "bolt")):
        (lists / f"{split}.txt").write_text(f"{name}\n")
        picture(tmp_path / "JPEGImages" / f"{name}.png", 50)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, BOX, strict=True))
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            "<annotation><size><width>100</width><height>80</height><depth>3</depth></size>"
            f"<object><name>{kind}</name><bndbox>{box}</bndbox></object></annotation>"
        )
    return tmp_path


def test_yolo(yolo: Path) -> None:
    arguments = ["--layout", "yolo", "--train", str(yolo / "images" / "train"), "--val", str(yolo / "images" / "val")]
    out = yolo / "coco"
    assert run("import_data", [*arguments, "--names", str(yolo / "data.yaml"), "--out", str(out)]) == 0
    val = CocoDetection(out, "val", "box")
    assert val.categories.names == ("bolt", "nut")
    target = val.target(0)
    assert target["labels"].tolist() == [2]
    np.testing.assert_allclose(target["boxes"].numpy(), [BOX], atol=0.01)
    assert val.pixels(0)[0, 0].tolist() == [41, 41, 41]
    assert run("import_data", [*arguments, "--names", str(yolo / "data.yaml"), "--out", str(out)]) == 1


def test_voc_numbers_both_splits_alike(voc: Path) -> None:
    lists = voc / "ImageSets" / "Main"
    counts = import_dataset("voc", lists / "train.txt", lists / "val.txt", voc / "coco")
    assert counts == {"train": (1, 1), "val": (1, 1)}
    for split, kind in (("train", "nut"), ("val", "bolt")):
        found = CocoDetection(voc / "coco", split, "box")
        assert found.categories.names == ("nut", "bolt")
        label = found.target(0)["labels"].tolist()[0]
        assert found.categories.name_of_label[label] == kind
        np.testing.assert_allclose(found.target(0)["boxes"].numpy(), [BOX], atol=1.01)  # VOC counts pixels from 1


def test_what_cannot_be_read_is_named(yolo: Path) -> None:
    train, val = yolo / "images" / "train", yolo / "images" / "val"
    with pytest.raises(UserError, match="--names: needed with yolo"):
        import_dataset("yolo", train, val, yolo / "coco")
    (yolo / "labels" / "val" / "a.txt").write_text("1 0.3 nonsense\n")
    with pytest.raises(UserError, match="val: cannot be converted"):
        import_dataset("yolo", train, val, yolo / "coco", names=yolo / "data.yaml")
    assert not (yolo / "coco").exists()
    with pytest.raises(UserError, match="no such folder of images"):
        import_dataset("voc", yolo / "nothing", val, yolo / "coco")


def test_categories_are_as_in_the_file(yolo: Path) -> None:
    import_dataset("yolo", yolo / "images/train", yolo / "images/val", yolo / "coco", names=yolo / "data.yaml")
    content = json.loads((yolo / "coco/annotations/instances_train2017.json").read_text())
    assert [(entry["id"], entry["name"]) for entry in content["categories"]] == [(1, "bolt"), (2, "nut")]

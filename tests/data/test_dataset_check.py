"""Every kind of fault is planted once and found once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from norton_deploy.commands import run
from norton_deploy.data.dataset_check import check_dataset, check_layout
from norton_deploy.errors import UserError


@pytest.fixture
def data(tiny_coco: Path, tmp_path: Path) -> Path:
    root = tmp_path / "data"
    shutil.copytree(tiny_coco, root)
    return root


def change(root: Path, split: str, edit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    file = root / "annotations" / f"instances_{split}2017.json"
    content: dict[str, Any] = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return content


def whats(root: Path) -> dict[str, str]:
    """What was found -> severity, without the warnings that drawn data have anyway."""
    found = check_dataset(root, "mask").findings
    return {finding.what: finding.severity for finding in found if "without objects" not in finding.what}


def test_sound_data_have_no_errors(data: Path) -> None:
    found = check_dataset(data, "mask")
    assert found.images == {"train": 6, "val": 4}
    found.require()
    assert whats(data) == {}


def test_errors_and_the_exit_status(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [entry["file_name"] for entry in change(data, "val", lambda content: None)["images"]]
    (data / "val2017" / names[0]).write_bytes(b"no picture")
    train = change(data, "train", lambda content: content["categories"].append({"id": 99, "name": "person"}))
    first = train["images"][0]
    shutil.copy(data / "train2017" / first["file_name"], data / "val2017" / names[1])

    def resize(content: dict[str, Any]) -> None:
        for entry in content["images"]:
            if entry["file_name"] == names[1]:
                entry["height"], entry["width"] = first["height"], first["width"]

    change(data, "val", resize)
    found = whats(data)
    assert {what for what, severity in found.items() if severity == "error"} >= {
        "bad entries in val",
        "pictures of val are in train too",
        "categories share a name",
        "categories are not alike in train and val",
    }
    assert run("check_data", ["--data", str(data), "--task", "mask"]) == 1
    assert "error: pictures of val are in train too: " in capsys.readouterr().err


def test_a_split_without_a_usable_image_says_why(data: Path) -> None:
    for path in (data / "val2017").iterdir():
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(path, exif=exif)
    with pytest.raises(UserError, match=r"no usable image; the first was image id .* before its EXIF orientation"):
        check_dataset(data, "mask")


def test_warnings(data: Path) -> None:
    change(data, "train", _spoil)
    picture = sorted((data / "train2017").iterdir())[0]
    with Image.open(picture) as image:
        exif = image.getexif()
        exif[0x0112] = 3
        image.save(picture, exif=exif)
    found = whats(data)
    assert set(found.values()) == {"warning"}
    kinds = " | ".join(found)
    assert "annotations without an area in train" in found
    for part in ("boxes of train reach outside", "masks of train reach outside", "less than 1 px", "annotated twice"):
        assert part in kinds
    assert "have an EXIF orientation: they are turned upright in training as in inference" in kinds


def _spoil(content: dict[str, Any]) -> None:
    one, two, three = [entry for entry in content["annotations"] if not entry["iscrowd"]][:3]
    one["bbox"][0] = -20.0
    del one["area"]
    two["bbox"][2] = 0.2
    three["segmentation"] = [[-50, 0, 20, 0, 20, 20]]
    content["annotations"].append({**two, "id": 10**6})


def test_the_fast_part_names_what_is_missing(data: Path) -> None:
    check_layout(data, "mask")
    shutil.rmtree(data / "val2017")
    with pytest.raises(UserError, match=r"val2017: not found; expected the images of instances_val2017\.json"):
        check_layout(data, "mask")
    (data / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match=r"instances_val2017\.json: not found; expected COCO's layout"):
        check_layout(data, "mask")


def test_contact_sheet(tiny_coco: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.jpg"
    arguments = ["--data", str(tiny_coco), "--task", "mask", "--sheet", str(sheet), "--json", str(tmp_path / "f.json")]
    assert run("check_data", arguments) == 0
    with Image.open(sheet) as image:
        assert image.size == (4 * 320, 2 * 320)  # six images, four in a row
    assert json.loads((tmp_path / "f.json").read_text())["images"] == {"train": 6, "val": 4}

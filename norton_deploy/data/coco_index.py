"""Reading and checking one COCO annotation file before anything is trained on it."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from norton_deploy.errors import UserError
from norton_deploy.structures import Task

Split = Literal["train", "val"]
Entry = dict[str, Any]

NUM_KEYPOINTS = 17
_PREFIX: dict[Task, str] = {"box": "instances", "mask": "instances", "keypoint": "person_keypoints"}
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class _BadEntryError(Exception):
    """An image or annotation entry cannot be used; the message says why."""


def annotation_file(root: str | Path, split: Split, task: Task) -> Path:
    """root/annotations/{instances,person_keypoints}_{split}2017.json."""
    return Path(root) / "annotations" / f"{_PREFIX[task]}_{split}2017.json"


def image_folder(root: str | Path, split: Split) -> Path:
    """root/{split}2017."""
    return Path(root) / f"{split}2017"


def read_pixels(path: Path, image_id: int, image_size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Decode an image as uint8 [H, W, 3] RGB (grey and CMYK converted, EXIF orientation ignored as COCO does).

    Raises:
        UserError: the file is missing, truncated, no image, or not of `image_size` (height, width).
    """
    try:
        with Image.open(path) as image:
            _check_size(image, image_size)
            return np.array(image.convert("RGB"))
    except (_BadEntryError, *_DECODING_ERRORS) as error:
        raise UserError(f"{path} (image id {image_id}): {_one_line(error)}; repair it or use --skip-bad") from error


def _one_line(error: Exception) -> str:
    return "the file is missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())


def _check_size(image: Image.Image, image_size: tuple[int, int]) -> None:
    if (image.height, image.width) != tuple(image_size):
        height, width = image_size
        raise _BadEntryError(f"is {image.width} x {image.height} pixels, the annotations say {width} x {height}")


def _check_decodes(path: Path, image_size: tuple[int, int]) -> None:
    """Decode at an eighth of the size, which still reads the whole file."""
    try:
        with Image.open(path) as image:
            _check_size(image, image_size)
            image.draft("L", (image.width // 8, image.height // 8))
            image.load()
    except _DECODING_ERRORS as error:
        raise _BadEntryError(_one_line(error)) from error


class _Complaints:
    """Raises at the first bad entry, or counts them and warns once."""

    def __init__(self, source: Path, skip_bad: bool) -> None:
        self.source, self.skip_bad = source, skip_bad
        self.counts: Counter[str] = Counter()
        self.first: str | None = None

    def add(self, kind: str, number: object, reason: object) -> None:
        message = f"{kind} id {number}: {reason}"
        if not self.skip_bad:
            raise UserError(f"{self.source}: {message}; repair the file or skip such entries with --skip-bad")
        self.counts[kind] += 1
        self.first = self.first or message

    def warn(self) -> None:
        if self.counts:
            total = ", ".join(f"{count} bad {kind}s" for kind, count in sorted(self.counts.items()))
            warnings.warn(f"{self.source}: skipped {total}; the first was {self.first}", stacklevel=4)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(entry: Entry, names: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise _BadEntryError(f"expected an object with fields, got {entry!r}")
    for name in names:
        if name not in entry:
            raise _BadEntryError(f"the field '{name}' is missing")


def _require_integers(entry: Entry, names: tuple[str, ...]) -> None:
    _require(entry, names)
    for name in names:
        if type(entry[name]) is not int:
            raise _BadEntryError(f"'{name}' must be an integer, got {entry[name]!r}")


def _name_of(entry: object, position: int) -> object:
    """What to call an entry in a message: its id, or its place in the list."""
    return entry["id"] if isinstance(entry, dict) and "id" in entry else f"(entry {position})"


def _check_image(entry: Entry, known: dict[int, Entry]) -> None:
    _require_integers(entry, ("id",))
    _require(entry, ("file_name", "height", "width"))
    if not isinstance(entry["file_name"], str):
        raise _BadEntryError(f"'file_name' must be a string, got {entry['file_name']!r}")
    if entry["id"] in known:
        raise _BadEntryError("there is another image with this id")
    for side in ("height", "width"):
        if not isinstance(entry[side], int) or entry[side] < 1:
            raise _BadEntryError(f"'{side}' must be a positive integer, got {entry[side]!r}")


def _check_segmentation(segmentation: object, image: Entry) -> None:
    if isinstance(segmentation, dict):
        size = [image["height"], image["width"]]
        if list(segmentation.get("size", [])) != size or "counts" not in segmentation:
            raise _BadEntryError(f"its RLE needs 'counts' and 'size' {size}, got size {segmentation.get('size')}")
        counts = segmentation["counts"]
        if not isinstance(counts, str) and not (isinstance(counts, list) and set(map(type, counts)) <= {int}):
            raise _BadEntryError("its RLE's 'counts' must be a string or a list of integers")
        if isinstance(counts, list) and sum(counts) != size[0] * size[1]:
            raise _BadEntryError(f"its RLE covers {sum(counts)} of the image's {size[0] * size[1]} pixels")
        return
    polygons = segmentation if isinstance(segmentation, list) else []
    sound = all(isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
    if sound:
        sound = all(set(map(type, polygon)) <= {int, float} for polygon in polygons)
    if not polygons or not sound:
        raise _BadEntryError("'segmentation' must be an RLE or polygons of three or more x, y pairs")


def _check_annotation(
    entry: Entry, known: set[int], images: dict[int, Entry], category_ids: set[int], task: Task
) -> None:
    _require(entry, ("bbox", "area"))
    if entry["id"] in known:
        raise _BadEntryError("there is another annotation with this id")
    if entry["id"] == 0:
        raise _BadEntryError("pycocotools takes a match with id 0 for a miss; number from 1")
    if entry["image_id"] not in images:
        raise _BadEntryError(f"points to image id {entry['image_id']}, which is not in the file")
    if entry["category_id"] not in category_ids:
        raise _BadEntryError(f"points to category id {entry['category_id']}, which is not in the file")
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise _BadEntryError(f"'bbox' must be four numbers x, y, width, height, got {box!r}")
    if entry.get("iscrowd", 0) not in (0, 1):
        raise _BadEntryError(f"'iscrowd' must be 0 or 1, got {entry['iscrowd']!r}")
    if not _is_number(entry["area"]):
        raise _BadEntryError(f"'area' must be a number, got {entry['area']!r}")
    if task == "mask":
        _require(entry, ("segmentation",))
        _check_segmentation(entry["segmentation"], images[entry["image_id"]])
    if task == "keypoint":
        _require(entry, ("keypoints", "num_keypoints"))
        points = entry["keypoints"]
        if not isinstance(points, list) or len(points) != 3 * NUM_KEYPOINTS or not all(map(_is_number, points)):
            length = len(points) if isinstance(points, list) else "none"
            raise _BadEntryError(f"'keypoints' must be {3 * NUM_KEYPOINTS} numbers (x, y, v of 17), got {length}")


def _read_json(path: Path, root: Path, split: Split) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: not found; expected COCO's layout in {root}: {split}2017/*.jpg and annotations/{path.name}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); is the download complete?") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{path}: the list '{name}' is missing; this is no COCO annotation file")
    return content


def _images_with_files(entries: list[Entry], folder: Path, complaints: _Complaints) -> dict[int, Entry]:
    """Image id -> entry of the sound images whose file is there (and decodes, when bad ones are skipped)."""
    try:
        present = {item.name for item in os.scandir(folder)}
    except OSError as error:
        raise UserError(f"{folder}: not found; expected the images of {complaints.source.name} here") from error
    images: dict[int, Entry] = {}
    for position, entry in enumerate(entries):
        try:
            _check_image(entry, images)
            name = entry["file_name"]
            if name not in present and not ("/" in name and (folder / name).is_file()):
                raise _BadEntryError(f"its file {folder / name} is missing")
        except _BadEntryError as error:
            complaints.add("image", _name_of(entry, position), error)
            continue
        images[entry["id"]] = entry
    if not complaints.skip_bad:
        return images

    def failure(entry: Entry) -> str | None:
        try:
            _check_decodes(folder / entry["file_name"], (entry["height"], entry["width"]))
        except _BadEntryError as error:
            return f"{folder / entry['file_name']} {error}"
        return None

    listed = list(images.values())
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        bar = tqdm(pool.map(failure, listed), total=len(listed), desc=f"checking {folder.name}", disable=None)
        for entry, reason in zip(listed, bar, strict=True):
            if reason is not None:
                complaints.add("image", entry["id"], reason)
                del images[entry["id"]]
    return images


def read_annotations(
    root: str | Path, split: Split, task: Task, *, skip_bad: bool = False
) -> tuple[list[Entry], list[list[Entry]], list[Entry]]:
    """Read and check a split's annotation file and the presence of its images.

    For task "keypoint" only categories with keypoints and their annotations are kept. A missing `iscrowd`
    means 0, as in pycocotools. Image files are not opened, except with `skip_bad`, which decodes every one
    (a minute or two for COCO-2017).

    Args:
        root: folder in COCO's layout.
        task: decides the annotation file and the fields that must be there.
        skip_bad: leave out bad entries with one counted warning instead of raising.

    Returns:
        images, the annotations of each, categories: entries as in the file, images ascending by id.

    Raises:
        UserError: the layout, the file or (without `skip_bad`) an entry is wrong; names the file and the id.
    """
    root = Path(root)
    source = annotation_file(root, split, task)
    content = _read_json(source, root, split)
    for entry in content["categories"]:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise UserError(f"{source}: a category needs an integer 'id' and a 'name', got {entry}")
    all_categories = {category["id"] for category in content["categories"]}
    categories = [entry for entry in content["categories"] if task != "keypoint" or "keypoints" in entry]
    if not categories:
        raise UserError(f"{source}: no category{' with keypoints' if task == 'keypoint' else ''}")
    category_ids = {entry["id"] for entry in categories}
    other_categories = all_categories - category_ids
    complaints = _Complaints(source, skip_bad)
    images = _images_with_files(content["images"], image_folder(root, split), complaints)
    listed = (entry.get("id") for entry in content["images"] if isinstance(entry, dict))
    unusable = {number for number in listed if type(number) is int} - set(images)
    ordered = [images[number] for number in sorted(images)]
    known: set[int] = set()
    of_image: dict[int, list[Entry]] = {entry["id"]: [] for entry in ordered}
    for position, entry in enumerate(content["annotations"]):
        try:
            _require_integers(entry, ("id", "image_id", "category_id"))
            if entry["image_id"] in unusable or entry["category_id"] in other_categories:
                continue
            _check_annotation(entry, known, images, category_ids, task)
        except _BadEntryError as error:
            complaints.add("annotation", _name_of(entry, position), error)
            continue
        known.add(entry["id"])
        entry.setdefault("iscrowd", 0)
        of_image[entry["image_id"]].append(entry)
    complaints.warn()
    if not ordered:
        raise UserError(f"{source}: no usable image; expected the files of 'images' in {image_folder(root, split)}")
    return ordered, [of_image[entry["id"]] for entry in ordered], categories

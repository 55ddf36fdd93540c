"""Reading and checking one COCO annotation file before anything is trained on it."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from norton_deploy.data.coco_entries import (
    BadEntryError,
    Entry,
    check_annotation,
    check_categories,
    check_image,
    name_of,
    require_ids,
)
from norton_deploy.data.image_file import check_decodes, read_image, sizes_of
from norton_deploy.errors import UserError
from norton_deploy.files import path_below, read_json
from norton_deploy.progress import progress_bar
from norton_deploy.structures import Task

Split = Literal["train", "val"]
_PREFIX: dict[Task, str] = {"box": "instances", "mask": "instances", "keypoint": "person_keypoints"}


def annotation_file(root: str | Path, split: Split, task: Task) -> Path:
    """root/annotations/{instances,person_keypoints}_{split}2017.json."""
    return Path(root) / "annotations" / f"{_PREFIX[task]}_{split}2017.json"


def image_folder(root: str | Path, split: Split) -> Path:
    """root/{split}2017."""
    return Path(root) / f"{split}2017"


def read_pixels(path: Path, image_id: int, image_size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Decode an annotated image as uint8 [H, W, 3] RGB, upright (see `norton_deploy.data.image_file`).

    Raises:
        UserError: the file is missing, truncated, no image, or upright not of `image_size` (height, width).
    """
    try:
        pixels = read_image(path)
        if pixels.shape[:2] != tuple(image_size):
            _check_size(path, image_size)
    except UserError as error:
        raise UserError(f"{error} (image id {image_id}; --skip-bad leaves it out)") from error
    return pixels


def _check_size(path: Path, image_size: tuple[int, int]) -> None:
    """Compare with what the annotations say; one that only fits the picture as it is stored was made without EXIF."""
    upright, stored = sizes_of(path)
    if upright == tuple(image_size):
        return
    height, width = image_size
    found = f"{path}: is {upright[1]} x {upright[0]} pixels upright, the annotations say {width} x {height}"
    if stored == tuple(image_size):
        found += ", as the file is stored before its EXIF orientation turns it; turn the annotations or strip that tag"
    raise UserError(found)


class MissingAreaWarning(UserWarning):
    """Annotations have no area."""


class _Complaints:
    """Raises at the first bad entry, or counts them and warns once."""

    def __init__(self, source: Path, skip_bad: bool) -> None:
        self.source, self.skip_bad = source, skip_bad
        self.counts: Counter[str] = Counter()
        self.first: str | None = None
        self.areas: list[int] = []
        """Ids of the annotations whose area was computed."""

    def add(self, kind: str, number: object, reason: object) -> None:
        message = f"{kind} id {number}: {reason}"
        if not self.skip_bad:
            raise UserError(f"{self.source}: {message}; repair the file or skip such entries with --skip-bad")
        self.counts[kind] += 1
        self.first = self.first or message

    def warn(self) -> None:
        if self.areas:
            warnings.warn(
                f"{self.source}: {len(self.areas)} annotations have no 'area', it was computed of the mask or else of "
                f"the box; the first is id {self.areas[0]}",
                MissingAreaWarning,
                stacklevel=4,
            )
        if self.counts:
            total = ", ".join(f"{count} bad {kind}s" for kind, count in sorted(self.counts.items()))
            warnings.warn(f"{self.source}: skipped {total}; the first was {self.first}", stacklevel=4)


def _read_file(path: Path, root: Path, split: Split) -> dict[str, Any]:
    if not path.exists():
        raise UserError(
            f"{path}: not found; expected COCO's layout in {root}: {split}2017/*.jpg and annotations/{path.name}"
        )
    content = read_json(path, "COCO's annotations")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{path}: the list '{name}' is missing; this is no COCO annotation file")
    return content


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long as a whole
        return False


def _images_with_files(entries: list[Entry], folder: Path, complaints: _Complaints) -> dict[int, Entry]:
    """Image id -> entry of the sound images whose file is there (and decodes, when bad ones are skipped)."""
    try:
        present = {item.name for item in os.scandir(folder)}
    except OSError as error:
        raise UserError(f"{folder}: not found; expected the images of {complaints.source.name} here") from error
    images: dict[int, Entry] = {}
    for position, entry in enumerate(entries):
        try:
            path = check_image(entry, images, folder)
            if entry["file_name"] not in present and not ("/" in entry["file_name"] and _is_file(path)):
                raise BadEntryError(f"its file {path} is missing")
        except BadEntryError as error:
            complaints.add("image", name_of(entry, position), error)
            continue
        images[entry["id"]] = entry
    if not complaints.skip_bad:
        return images

    def failure(entry: Entry) -> str | None:
        path = path_below(folder, entry["file_name"])
        try:
            _check_size(path, (entry["height"], entry["width"]))
            check_decodes(path)
        except UserError as error:
            return str(error)
        return None

    listed = list(images.values())
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        bar = progress_bar(pool.map(failure, listed), total=len(listed), desc=f"checking {folder.name}", unit="image")
        for entry, reason in zip(listed, bar, strict=True):
            if reason is not None:
                complaints.add("image", entry["id"], reason)
                del images[entry["id"]]
    return images


def read_annotations(
    root: str | Path, split: Split, task: Task, *, skip_bad: bool = False
) -> tuple[list[Entry], list[list[Entry]], list[Entry]]:
    """Read and check a split's annotation file and the presence of its images.

    Every number is checked here, once: finite, within bounds that `norton_deploy.data.coco_entries` states, near its
    image. For task "keypoint" only categories with keypoints and their annotations are kept. A missing `iscrowd`
    means 0, as in pycocotools; a missing `area` is computed, with one warning. Image files are not opened, except
    with `skip_bad`, which decodes every one (a minute or two for COCO-2017).

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
    content = _read_file(source, root, split)
    all_categories = check_categories(content["categories"], source)
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
            require_ids(entry)
            if entry["image_id"] in unusable or entry["category_id"] in other_categories:
                continue
            has_area = entry.get("area") is not None
            check_annotation(entry, known, images, category_ids, task)
        except BadEntryError as error:
            complaints.add("annotation", name_of(entry, position), error)
            continue
        known.add(entry["id"])
        if not has_area:
            complaints.areas.append(entry["id"])
        entry.setdefault("iscrowd", 0)
        of_image[entry["image_id"]].append(entry)
    if not ordered:
        first = f"the first was {complaints.first}" if complaints.first else "the list 'images' is empty"
        raise UserError(f"{source}: no usable image; {first}")
    complaints.warn()
    return ordered, [of_image[entry["id"]] for entry in ordered], categories

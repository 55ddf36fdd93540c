"""What is wrong, or odd, with a dataset in COCO's layout, all of it at once and before anything is trained on it."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from norton_deploy.data.coco_entries import SMALLEST_BOX_SIDE, is_degenerate
from norton_deploy.data.coco_index import (
    Entry,
    MissingAreaWarning,
    Split,
    annotation_file,
    image_folder,
    read_annotations,
)
from norton_deploy.data.image_file import is_turned
from norton_deploy.errors import UserError
from norton_deploy.files import sha256_of
from norton_deploy.structures import Task

OUTSIDE = 1.0
"""So many pixels an annotation may reach beyond the image; tools round differently."""
EXIF_POLICY = "they are turned upright in training as in inference, and annotations must be of the upright picture"
SPLITS: tuple[Split, ...] = get_args(Split)
Severity = Literal["error", "warning"]
TOLD: tuple[tuple[type[Warning], Severity, str], ...] = (
    (UserWarning, "error", "bad entries"),
    (MissingAreaWarning, "warning", "annotations without an area"),
)
"""Kinds of warnings of `read_annotations`."""


@dataclass(frozen=True)
class Finding:
    """Attributes: an error (stops a training, or falsifies a result) or a warning; what; how many; the first one."""

    severity: Severity
    what: str
    count: int
    first: str

    def line(self) -> str:
        """For people."""
        return f"{self.severity}: {self}"

    def __str__(self) -> str:
        return f"{self.what}: {self.first}" if self.count == 1 else f"{self.count} {self.what}; the first: {self.first}"


@dataclass
class DatasetCheck:
    """What was found in a dataset.

    Attributes:
        images, objects: of each split, sound ones.
        findings: errors first.
    """

    root: Path
    images: dict[str, int] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, severity: Severity, what: str, found: Iterable[str]) -> None:
        """Record a kind of finding, if there is any; `found` describes each."""
        listed = list(found)
        if listed:
            self.findings.append(Finding(severity, what, len(listed), listed[0]))
            self.findings.sort(key=lambda finding: finding.severity)

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def lines(self) -> list[str]:
        """For people."""
        counts = [f"{split}: {self.images[split]} images, {self.objects[split]} objects" for split in self.images]
        return [*counts, *(finding.line() for finding in self.findings)]

    def require(self) -> None:
        """
        Raises:
            UserError: there are errors; the message has the first.
        """
        if self.errors:
            more = f"; {len(self.errors) - 1} more of other kinds" if len(self.errors) > 1 else ""
            raise UserError(f"{self.root}: {self.errors[0]}{more}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the folder."""
        findings = [asdict(finding) for finding in self.findings]
        return {"images": self.images, "objects": self.objects, "findings": findings}


def check_layout(root: str | Path, task: Task) -> None:
    """The fast part: annotation files and image folders of both splits are there, before one of them is read.

    Raises:
        UserError: names what is missing.
    """
    for split in SPLITS:
        file, folder = annotation_file(root, split, task), image_folder(root, split)
        if not file.is_file():
            raise UserError(f"{file}: not found; expected COCO's layout in {root}: train2017/, val2017/, annotations/")
        if not folder.is_dir():
            raise UserError(f"{folder}: not found; expected the images of {file.name} here")


def check_dataset(root: str | Path, task: Task) -> DatasetCheck:
    """Read both splits, every image, and every annotation.

    Errors: entries that cannot be used, images that are missing, broken or of another size, pictures that are in both
    splits, a name that two categories or image entries share, categories that differ between the splits, a split
    without objects. Warnings: pictures with an EXIF orientation, annotations without an area, outside of their
    image, tiny ones, the same object twice, categories and images without objects.

    Raises:
        UserError: a file or folder is missing, or is not what it should be.
    """
    check_layout(root, task)
    found = DatasetCheck(Path(root))
    seen: dict[str, dict[str, str]] = {}
    categories: dict[str, dict[int, str]] = {}
    for split in SPLITS:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            images, annotations, entries = read_annotations(root, split, task, skip_bad=True)
        for kind, severity, what in TOLD:
            found.add(severity, f"{what} in {split}", (str(note.message) for note in told if note.category is kind))
        found.images[split], found.objects[split] = len(images), sum(map(len, annotations))
        categories[split] = {entry["id"]: entry["name"] for entry in entries}
        _check_entries(found, split, images, annotations, entries)
        seen[split] = _check_files(found, split, image_folder(root, split), images)
    shared = [f"{name} is {seen['train'][digest]} of train" for digest, name in seen["val"].items()
              if digest in seen["train"]]  # fmt: skip
    found.add("error", "pictures of val are in train too", shared)
    different = sorted(set(categories["train"].items()) ^ set(categories["val"].items()))
    found.add("error", "categories are not alike in train and val", (f"{number} {name}" for number, name in different))
    return found


def _check_entries(
    found: DatasetCheck, split: str, images: list[Entry], annotations: list[list[Entry]], categories: list[Entry]
) -> None:
    """What the annotation file alone tells."""
    used = Counter(entry["category_id"] for entries in annotations for entry in entries if not entry.get("iscrowd"))
    if not used:
        found.add("error", "no object in a split", [split])
    unused = (entry["name"] for entry in categories if not used[entry["id"]])
    found.add("warning", f"categories without objects in {split}", unused)
    for what, names in (
        ("categories share a name", [entry["name"] for entry in categories]),
        (f"image entries of {split} share a file", [entry["file_name"] for entry in images]),
    ):
        found.add("error", what, (name for name, count in Counter(names).items() if count > 1))
    pairs = [(image, entry) for image, entries in zip(images, annotations, strict=True) for entry in entries]
    located = [(f"annotation {entry['id']} of {image['file_name']}", image, entry) for image, entry in pairs]
    found.add("warning", f"boxes of {split} reach outside of their image",
              (where for where, image, entry in located if _is_outside(_corners(entry), image)))  # fmt: skip
    found.add("warning", f"masks of {split} reach outside of their image",
              (where for where, image, entry in located if _is_outside(_points(entry), image)))  # fmt: skip
    tiny = (where for where, image, entry in located if not entry.get("iscrowd") and is_degenerate(entry, image))
    found.add("warning", f"boxes of {split} are less than {SMALLEST_BOX_SIDE:g} px wide or high inside the image", tiny)
    copies = Counter((entry["image_id"], entry["category_id"], *entry["bbox"]) for _, entry in pairs)
    found.add("warning", f"objects of {split} are annotated twice",
              (f"{key[2:]} of image {key[0]}" for key, count in copies.items() if count > 1))  # fmt: skip
    empty = (image["file_name"] for image, entries in zip(images, annotations, strict=True) if not entries)
    found.add("warning", f"images of {split} without objects", empty)


def _check_files(found: DatasetCheck, split: str, folder: Path, images: list[Entry]) -> dict[str, str]:
    """What the image files tell; returns digest -> name."""

    def look(entry: Entry) -> tuple[str, str, bool]:
        path = folder / entry["file_name"]
        return entry["file_name"], sha256_of(path), is_turned(path)

    with ThreadPoolExecutor() as pool:
        looked = list(pool.map(look, images))
    turned = (name for name, _, is_turned in looked if is_turned)
    found.add("warning", f"pictures of {split} have an EXIF orientation: {EXIF_POLICY}", turned)
    names: dict[str, list[str]] = defaultdict(list)
    for name, digest, _ in looked:
        names[digest].append(name)
    same = (" and ".join(listed) for listed in names.values() if len(listed) > 1)
    found.add("warning", f"pictures of {split} are there twice", same)
    return {digest: listed[0] for digest, listed in names.items()}


def _corners(entry: Entry) -> list[float]:
    x, y, width, height = entry["bbox"]
    return [x, y, x + width, y + height]


def _points(entry: Entry) -> list[float]:
    polygons = entry.get("segmentation")
    return [value for polygon in polygons for value in polygon] if isinstance(polygons, list) else []


def _is_outside(points: list[float], image: Entry) -> bool:
    """Whether any of x, y, x, y, ... lies more than a pixel outside of the image."""
    sides = (image["width"], image["height"])
    return any(not -OUTSIDE <= value <= sides[index % 2] + OUTSIDE for index, value in enumerate(points))

"""Datasets in YOLO's or Pascal VOC's layout as COCO's, read and converted by supervision."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import supervision as sv

from norton_deploy.config import read_yaml
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.coco_index import Split, annotation_file, image_folder
from norton_deploy.data.dataset_check import SPLITS
from norton_deploy.errors import UserError, shown
from norton_deploy.files import new_folder

Layout = Literal["yolo", "voc"]
FOLDERS: dict[Layout, tuple[str, str]] = {"yolo": ("images", "labels"), "voc": ("JPEGImages", "Annotations")}
"""Usual names of the folder of images and of that of annotations beside it."""
FARTHEST = 1e5
"""Largest number in an annotation: a polygon with a corner far away takes OpenCV hours to fill."""


def import_dataset(
    layout: Layout, train: Path, val: Path, out: Path, *, names: Path | None = None
) -> dict[str, tuple[int, int]]:
    """Write a dataset in COCO's layout; images are copied, annotations become instances_*.json.

    Args:
        train, val: folders of images, whose annotations lie in labels/ (yolo) or Annotations/ (voc) in place of images/
            or JPEGImages/, or beside them; of voc also a list of names, ImageSets/Main/train.txt.

    Returns:
        (images, objects) of "train" and "val".

    Raises:
        UserError: a folder or annotation cannot be read; `out` holds something.
    """
    if layout == "yolo":
        if names is None:
            raise UserError("--names: needed with yolo, its data.yaml")
        read_yaml(names)
    path_of = dict(zip(SPLITS, (train, val), strict=True))
    read = {split: _read(layout, path, names) for split, path in path_of.items()}
    classes = sorted({name for dataset in read.values() for name in dataset.classes}, key=_order(read["train"]))
    counts: dict[str, tuple[int, int]] = {}
    with new_folder(out) as partial, _one_line(out):
        for split, dataset in read.items():
            _number_alike(dataset, classes)
            images, annotations = image_folder(partial, split), annotation_file(partial, split, "box")
            images.mkdir(parents=True)
            for path in dataset.image_paths:
                shutil.copyfile(path, images / Path(path).name)
            dataset.as_coco(annotations_path=str(annotations))
            _check_readable(partial, split, path_of[split])
            written = json.loads(annotations.read_text())
            counts[split] = (len(written["images"]), len(written["annotations"]))
    return counts


def _read(layout: Layout, path: Path, names: Path | None) -> sv.DetectionDataset:
    wanted: set[str] | None = None
    images = path
    if path.suffix == ".txt":
        if not path.is_file() or len(path.parents) < 3:
            raise UserError(f"{path}: not a list of names as in ImageSets/Main/")
        wanted = {line.split()[0] for line in path.read_text().splitlines() if line.split()}
        images = path.parents[2] / FOLDERS[layout][0]
    if not images.is_dir():
        raise UserError(f"{images}: no such folder of images")
    annotations = _annotations_of(layout, images)
    with _one_line(path):
        _check_numbers(layout, annotations)
        if layout == "yolo":
            dataset = sv.DetectionDataset.from_yolo(str(images), str(annotations), str(names))
        else:
            dataset = sv.DetectionDataset.from_pascal_voc(str(images), str(annotations))
    paths = [file for file in dataset.image_paths if wanted is None or Path(file).stem in wanted]
    if not paths:
        raise UserError(f"{path}: no images here")
    return sv.DetectionDataset(dataset.classes, paths, {file: dataset.annotations[file] for file in paths})


def _check_numbers(layout: Layout, annotations: Path) -> None:
    for file in sorted(annotations.glob("*.txt" if layout == "yolo" else "*.xml")):
        if layout == "yolo":
            words = file.read_text(encoding="utf-8", errors="replace").split()
        else:
            shapes = [shape for kind in ("bndbox", "polygon") for shape in ElementTree.parse(file).iter(kind)]
            words = [value.text or "" for shape in shapes for value in shape]
        for word in words:
            with contextlib.suppress(ValueError):  # no number: supervision's to judge
                if not abs(float(word)) <= FARTHEST:
                    raise UserError(f"{file}: holds {shown(word)}; expected finite numbers up to {FARTHEST:g}")


def _annotations_of(layout: Layout, images: Path) -> Path:
    """The folder of annotations: the usual name in place of the images' (the last in the path), or the same folder."""
    own, other = FOLDERS[layout]
    parts = list(images.parts)
    if own in parts:
        last = len(parts) - 1 - parts[::-1].index(own)
        beside = Path(*parts[:last], other, *parts[last + 1 :])
        if beside.is_dir():
            return beside
    return images


def _check_readable(root: Path, split: Split, source: Path) -> None:
    """supervision writes numbers that are no box and lists without an object; they are refused here, as at reading."""
    try:
        CocoDetection(root, split, "box")
    except UserError as error:
        raise UserError(f"{source}: cannot be converted: {str(error).rpartition('.json: ')[2]}") from error


def _order(first: sv.DetectionDataset) -> Callable[[str], tuple[int, str]]:
    """YOLO's classes keep the order of their numbers; what only the other split has comes after, by name."""
    place = {name: index for index, name in enumerate(first.classes)}
    return lambda name: (place.get(name, len(place)), name)


def _number_alike(dataset: sv.DetectionDataset, classes: list[str]) -> None:
    """Give the dataset these classes, in place: VOC's are numbered as they appear, in each split otherwise."""
    numbers = np.array([classes.index(name) for name in dataset.classes], int)
    for found in dataset.annotations.values():
        if found.class_id is not None and len(found.class_id):
            found.class_id = numbers[found.class_id]
    dataset.classes = list(classes)


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """supervision's complaints about a file as a `UserError`."""
    try:
        yield
    except (ValueError, KeyError, OSError, SyntaxError) as error:  # SyntaxError: broken XML
        raise UserError(f"{path}: cannot be converted: {' '.join(str(error).split())}") from error

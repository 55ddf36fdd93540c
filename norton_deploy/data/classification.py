"""Images in one folder per class: ImageNet, CIFAR-10 as files, or crops of a detection dataset's objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms import v2

from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.image_file import read_picture
from norton_deploy.errors import UserError
from norton_deploy.files import new_folder, path_component
from norton_deploy.progress import progress_bar
from norton_deploy.structures import Categories

Split = Literal["train", "val"]

CROP_CONTEXT = 1.15  # side of an object's crop in units of the object's longer side
JPEG_QUALITY = 92


def classification_transform(
    split: Split, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> v2.Compose:
    """PIL image -> float32 [3, H, W], normalised: in training a random crop of 8-100 % of the area, mirrored; otherwise
    the middle 87.5 %.

    Args:
        split: "train" augments, "val" does not.
        image_size: (height, width) in pixels.
        mean, std: of the RGB channels, 0..1.
    """
    height, width = size = list(image_size)
    if split == "train":
        steps: list[object] = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        short = round(min(size) / 0.875) if height == width else [round(side / 0.875) for side in size]
        steps = [v2.Resize(short, antialias=True), v2.CenterCrop(size)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return v2.Compose(steps)


@dataclass(frozen=True)
class ClassFiles:
    """Attributes:
    folder: of the split.
    names: file of every image, relative to the folder.
    labels: int64 [N], indices into `classes`.
    classes: in the order of the labels.
    """

    folder: Path
    names: list[str]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def paths(self) -> list[Path]:
        """All files."""
        return [self.folder / name for name in self.names]


def list_class_files(root: Path, split: Split, classes: Sequence[str] | None = None) -> ClassFiles:
    """The images of root/train/CLASS/* or root/val/CLASS/* (or root/test/CLASS/*); nothing is decoded.

    Args:
        root: folder with train/ and val/ or test/.
        classes: class names in the order of the labels, for example a checkpoint's; by default the sorted
            folders of train/, or of the split itself where there is no train/.

    Raises:
        UserError: a folder is missing or empty, or has a class that `classes` lacks.
    """
    folder = _split_folder(root, split)
    found = _class_names(folder)
    if classes is None:
        classes = _class_names(root / "train") if (root / "train").is_dir() else found
    known = require_known(folder, found, classes)
    samples = make_dataset(str(folder), {name: known[name] for name in found}, IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise UserError(f"{folder}: no images; expected CLASS/*.jpg (or .png, .webp, ...)")
    names = [str(Path(path).relative_to(folder)) for path, _ in samples]
    return ClassFiles(folder, names, np.array([label for _, label in samples], np.int64), tuple(classes))


def class_folders(root: Path) -> tuple[str, ...]:
    """The classes of root/train/, in the order of their labels.

    Raises:
        UserError: the folder is missing or has none.
    """
    return tuple(_class_names(_split_folder(root, "train")))


def require_known(folder: Path, found: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """Label of each of `classes`.

    Raises:
        UserError: the data has a class that is none of them.
    """
    known = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in found if name not in known]:
        raise UserError(
            f"{folder / unknown[0]}: the class '{unknown[0]}' is not one of the {len(known)} "
            "known classes; remove the folder or train with it"
        )
    return known


class ClassificationFolder(Dataset[tuple[Tensor, int, str]]):
    """The images of a split, read when they are wanted, as (image, label, name).

    Item i is (float32 [3, H, W] normalised, label 0..K-1, file name relative to the split's folder). The
    augmentation of an image depends on (seed, epoch, i) alone. Pictures are upright, see
    `norton_deploy.data.image_file`.
    """

    def __init__(self, files: ClassFiles, transform: v2.Compose, *, seed: int = 0) -> None:
        self.files, self.transform = files, transform
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.files.names)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that seeds the augmentation; call it before the epoch's DataLoader starts workers."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        name = self.files.names[index]
        picture = read_picture(self.files.folder / name)
        # torchvision's transforms draw from torch's global generator: lend it one seeded for this item.
        with torch.random.fork_rng(devices=[]):
            state = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0] >> 1))
            image: Tensor = self.transform(picture)
        return image.as_subclass(Tensor), int(self.files.labels[index]), name


def _split_folder(root: Path, split: Split) -> Path:
    candidates = [root / name for name in (("train",) if split == "train" else ("val", "test"))]
    for folder in candidates:
        if folder.is_dir():
            return folder
    names = " or ".join(f"{folder.name}/" for folder in candidates)
    raise UserError(f"{root}: no folder {names}; expected {root}/{candidates[0].name}/CLASS/*.jpg")


def _class_names(folder: Path) -> list[str]:
    try:
        return find_classes(str(folder))[0]
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no class folders; expected {folder}/CLASS/*.jpg") from error


def crop_square(picture: npt.NDArray[Any], box: npt.NDArray[np.float32], size: int) -> npt.NDArray[Any]:
    """The square around a box, resized to [size, size, 3]; what lies outside the image is mirrored into it.

    Args:
        picture: uint8 [H, W, 3].
        box: xyxy in pixels.
        size: side of the result in pixels.
    """
    centre = (box[:2] + box[2:]) / 2
    side = max(2, round(float((box[2:] - box[:2]).max()) * CROP_CONTEXT))
    x, y = (round(float(value) - side / 2) for value in centre)
    height, width = picture.shape[:2]
    inside = picture[max(y, 0) : min(y + side, height), max(x, 0) : min(x + side, width)]
    borders = (max(-y, 0), max(y + side - height, 0), max(-x, 0), max(x + side - width, 0))
    square = cv2.copyMakeBorder(inside, *borders, cv2.BORDER_REFLECT)
    shrinks = side > size
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _class_folders(categories: Categories, source: str | Path) -> dict[int, str]:
    """Label -> name of its class's folder."""
    folders = {label: path_component(name) for label, name in categories.name_of_label.items()}
    if len(set(folders.values())) < len(folders):
        twice = next(folder for folder, count in Counter(folders.values()).items() if count > 1)
        raise UserError(f"{source}: two categories would share the folder '{twice}'; rename one")
    return folders


def write_crops(
    coco_root: str | Path,
    out: str | Path,
    size: int = 48,
    *,
    smallest_side: float = 10.0,
    skip_bad: bool = False,
    progress: bool = False,
) -> dict[str, int]:
    """Object crops of a COCO dataset as a classification dataset: a stand-in for ImageNet pretraining.

    Writes out/train/CLASS/*.jpg and out/val/CLASS/*.jpg from both splits' boxes, crowds left out; CLASS is the
    category's name as `path_component` writes it.
    Everything is written beside `out` and renamed at the end.

    Args:
        coco_root: folder in COCO's layout.
        out: folder to make; must not exist or be empty.
        size: side of a crop in pixels.
        smallest_side: objects whose longer side is shorter are left out, in pixels.
        skip_bad: skip bad images and annotations with a counted warning.

    Returns:
        number of crops of each split.

    Raises:
        UserError: `out` holds something, or the dataset is wrong or has no object large enough.
    """
    if size < 8:
        raise UserError(f"crops: expected a size of at least 8 px, got {size}")
    counts: dict[str, int] = {}
    with new_folder(out) as partial:
        for split in get_args(Split):
            dataset = CocoDetection(coco_root, split, "box", keep_empty=False, skip_bad=skip_bad)
            folder_of_label = _class_folders(dataset.categories, coco_root)
            counts[split] = 0
            for index in progress_bar(range(len(dataset)), desc=f"{split} crops", unit="image", show=progress):
                target = dataset.target(index)
                boxes = target["boxes"].numpy()
                large = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).max(axis=1) >= smallest_side)
                if not len(large):
                    continue
                picture = cv2.cvtColor(dataset.pixels(index), cv2.COLOR_RGB2BGR)
                for number in large:
                    folder = partial / split / folder_of_label[int(target["labels"][number])]
                    folder.mkdir(parents=True, exist_ok=True)
                    file = folder / f"{target['image_id']:012d}_{number}.jpg"
                    crop = crop_square(picture, boxes[number], size)
                    if not cv2.imwrite(str(file), crop, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
                        raise UserError(f"{file}: cannot write the image; is the disk full?")
                    counts[split] += 1
            if not counts[split]:
                raise UserError(f"{coco_root}: no object of the {split} split is {smallest_side:g} px or larger")
    return counts

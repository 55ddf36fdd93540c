"""Images in one folder per class: ImageNet, CIFAR-10 as files, or crops of a detection dataset's objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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

Style = Literal["cifar", "imagenet"]
Split = Literal["train", "val"]

CROP_CONTEXT = 1.15  # side of an object's crop in units of the object's longer side
JPEG_QUALITY = 92
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def classification_transform(
    style: Style,
    split: Split,
    image_size: tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> v2.Compose:
    """PIL image -> float32 [3, H, W], normalised.

    "cifar": resize to `image_size` where it differs; in training pad by an eighth, crop at random, mirror.
    "imagenet": in training a random crop of 8-100 % of the area, mirrored; otherwise the middle 87.5 %.

    Args:
        style: which of the two.
        split: "train" augments, "val" does not.
        image_size: (height, width) in pixels.
        mean, std: of the RGB channels, 0..1.
    """
    if style not in get_args(Style):
        raise UserError(f"classification style '{style}': expected one of {', '.join(get_args(Style))}")
    height, width = size = list(image_size)
    steps: list[object] = []
    if style == "cifar":
        steps.append(v2.Resize(size, antialias=True))
        if split == "train":
            border = [max(1, width // 8), max(1, height // 8)]
            steps += [v2.RandomCrop(size, padding=border, padding_mode="reflect"), v2.RandomHorizontalFlip()]
    elif split == "train":
        steps += [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        short = round(min(size) / 0.875) if height == width else [round(side / 0.875) for side in size]
        steps += [v2.Resize(short, antialias=True), v2.CenterCrop(size)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return v2.Compose(steps)


class ClassificationFolder(Dataset[tuple[Tensor, int, str]]):
    """root/train/CLASS/* and root/val/CLASS/* (or root/test/CLASS/*) as (image, label, name).

    Item i is (float32 [3, H, W] normalised, label 0..K-1, file name relative to the split's folder). The
    augmentation of an image depends on (seed, epoch, i) alone.

    Args:
        root: folder with train/ and val/ or test/.
        style, image_size, mean, std: see `classification_transform`.
        seed: of the augmentation.
        classes: class names in the order of the labels, for example a checkpoint's; by default the sorted
            folders of train/, or of the split itself where there is no train/.

    Attributes:
        classes: class names in the order of the labels.
        names: file of every item, relative to the split's folder.
        labels: int64 [N].

    Pictures are upright, see `norton_deploy.data.image_file`.

    Raises:
        UserError: a folder is missing or empty, or has a class that `classes` lacks.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        *,
        style: Style,
        image_size: tuple[int, int],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
        classes: Sequence[str] | None = None,
    ) -> None:
        root = Path(root)
        self.folder = _split_folder(root, split)
        found = _class_names(self.folder)
        if classes is None:
            classes = _class_names(root / "train") if (root / "train").is_dir() else found
        self.classes = tuple(classes)
        label_of_class = {name: label for label, name in enumerate(self.classes)}
        if unknown := [name for name in found if name not in label_of_class]:
            raise UserError(
                f"{self.folder / unknown[0]}: the class '{unknown[0]}' is not one of the {len(self.classes)} "
                "known classes; remove the folder or train with it"
            )
        present = {name: label_of_class[name] for name in found}
        samples = make_dataset(str(self.folder), present, IMG_EXTENSIONS, allow_empty=True)
        if not samples:
            raise UserError(f"{self.folder}: no images; expected CLASS/*.jpg (or .png, .webp, ...)")
        self.names = [str(Path(path).relative_to(self.folder)) for path, _ in samples]
        self.labels = np.array([label for _, label in samples], np.int64)
        self.transform = classification_transform(style, split, image_size, mean, std)
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.names)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that seeds the augmentation; call it before the epoch's DataLoader starts workers."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        path = self.folder / self.names[index]
        picture = read_picture(path)
        # torchvision's transforms draw from torch's global generator: lend it one seeded for this item.
        with torch.random.fork_rng(devices=[]):
            state = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0] >> 1))
            image: Tensor = self.transform(picture)
        return image.as_subclass(Tensor), int(self.labels[index]), self.names[index]


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

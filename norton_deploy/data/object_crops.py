"""Object crops of a COCO dataset as a classification dataset: a stand-in for ImageNet pretraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from norton_deploy.data.coco import CocoDetection
from norton_deploy.errors import UserError
from norton_deploy.files import new_folder

CONTEXT = 1.15  # side of the crop in units of the object's longer side
JPEG_QUALITY = 92


def crop_square(picture: npt.NDArray[Any], box: npt.NDArray[np.float32], size: int) -> npt.NDArray[Any]:
    """The square around a box, resized to [size, size, 3]; what lies outside the image is mirrored into it.

    Args:
        picture: uint8 [H, W, 3].
        box: xyxy in pixels.
        size: side of the result in pixels.
    """
    centre = (box[:2] + box[2:]) / 2
    side = max(2, round(float((box[2:] - box[:2]).max()) * CONTEXT))
    x, y = (round(float(value) - side / 2) for value in centre)
    height, width = picture.shape[:2]
    inside = picture[max(y, 0) : min(y + side, height), max(x, 0) : min(x + side, width)]
    borders = (max(-y, 0), max(y + side - height, 0), max(-x, 0), max(x + side - width, 0))
    square = cv2.copyMakeBorder(inside, *borders, cv2.BORDER_REFLECT)
    shrinks = side > size
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def write_crops(
    coco_root: str | Path,
    out: str | Path,
    size: int = 48,
    *,
    smallest_side: float = 10.0,
    skip_bad: bool = False,
    progress: bool = False,
) -> dict[str, int]:
    """Write out/train/CLASS/*.jpg and out/val/CLASS/*.jpg from both splits' boxes, crowds left out.

    Everything is written beside `out` and renamed at the end.

    Args:
        coco_root: folder in COCO's layout.
        out: folder to make; must not exist or be empty.
        size: side of a crop in pixels.
        smallest_side: objects whose longer side is shorter are left out, in pixels.
        skip_bad: skip bad images and annotations with a counted warning.
        progress: show progress bars.

    Returns:
        number of crops of each split.

    Raises:
        UserError: `out` holds something, or the dataset is wrong or has no object large enough.
    """
    if size < 8:
        raise UserError(f"crops: expected a size of at least 8 px, got {size}")
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    counts: dict[str, int] = {}
    with new_folder(out) as partial:
        for split in splits:
            dataset = CocoDetection(coco_root, split, "box", keep_empty=False, skip_bad=skip_bad)
            name_of_label = dataset.categories.name_of_label
            counts[split] = 0
            for index in tqdm(range(len(dataset)), desc=f"{split} crops", unit="image", disable=not progress):
                target = dataset.target(index)
                boxes = target["boxes"].numpy()
                large = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).max(axis=1) >= smallest_side)
                if not len(large):
                    continue
                picture = cv2.cvtColor(dataset.pixels(index), cv2.COLOR_RGB2BGR)
                for number in large:
                    folder = partial / split / name_of_label[int(target["labels"][number])].replace(" ", "_")
                    folder.mkdir(parents=True, exist_ok=True)
                    file = folder / f"{target['image_id']:012d}_{number}.jpg"
                    crop = crop_square(picture, boxes[number], size)
                    if not cv2.imwrite(str(file), crop, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
                        raise UserError(f"{file}: cannot write the image; is the disk full?")
                    counts[split] += 1
            if not counts[split]:
                raise UserError(f"{coco_root}: no object of the {split} split is {smallest_side:g} px or larger")
    return counts

"""The embedded dataset: synthetic scenes written in COCO-2017's own folder layout.

Six COCO categories: articulated people with keypoints, and stop signs, umbrellas, sports balls, kites and
clocks as textured shapes, on textured backgrounds among shapes that are no category. The class is carried
mostly by outline and inner drawing; each shape also has a favourite hue that it takes nine times in ten
(`shapes.COLOUR_HINT`), which makes training from nothing much quicker, and which other objects use
too. It is a stand-in with exact ground truth for trying the whole pipeline, not a substitute for COCO: scores
on it say nothing about scores on COCO.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from norton_deploy.data.synthetic.people import KEYPOINTS, SKELETON
from norton_deploy.data.synthetic.scene import PERSON, Scene, SyntheticVideo, draw_scene
from norton_deploy.data.synthetic.shapes import SHAPES
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, new_folder
from norton_deploy.progress import progress_bar

__all__ = ["CATEGORIES", "Scene", "SyntheticVideo", "draw_scene", "write_dataset"]

CATEGORIES: list[dict[str, Any]] = [
    {"id": PERSON, "name": "person", "supercategory": "person"},
    *({"id": number, "name": shape[0], "supercategory": shape[1]} for number, shape in SHAPES.items()),
]
JPEG_QUALITY = 92
_SPLITS = ("train", "val")
_PARALLEL_FROM = 64  # images; below this, starting processes costs more than it saves


def _write_image(
    folder: Path, split: str, index: int, seed: int, image_sizes: tuple[int, int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw and write image `index` of a split; return its COCO image entry and its annotations."""
    split_number = _SPLITS.index(split)
    low, high = image_sizes
    sides = np.random.default_rng((seed, split_number, index, 1)).integers(low, high + 1, size=2)
    image_size = (int(sides[0]), int(sides[1]))
    scene = draw_scene((seed, split_number, index), image_size)
    image_id = index + 1 + split_number * 1_000_000
    file_name = f"{image_id:012d}.jpg"
    picture = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(folder / f"{split}2017" / file_name), picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise UserError(f"{folder / f'{split}2017' / file_name}: cannot write the image; is the disk full?")
    height, width = image_size
    entry = {"id": image_id, "file_name": file_name, "height": height, "width": width, "license": 1}
    return entry, [{**annotation, "image_id": image_id} for annotation in scene.annotations]


def _write_split(
    folder: Path, split: str, count: int, seed: int, image_sizes: tuple[int, int], workers: int, progress: bool
) -> None:
    (folder / f"{split}2017").mkdir(parents=True)
    jobs = range(count)
    arguments = ([folder] * count, [split] * count, jobs, [seed] * count, [image_sizes] * count)
    bar: dict[str, Any] = {"total": count, "desc": f"{split} images", "unit": "image", "show": progress}
    if workers > 1 and count >= _PARALLEL_FROM:
        # Not forked: a child cannot use the threads that OpenCV and OpenMP have started in its parent.
        with ProcessPoolExecutor(workers, get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
            written = list(progress_bar(pool.map(_write_image, *arguments, chunksize=8), **bar))
    else:
        written = list(progress_bar(map(_write_image, *arguments), **bar))
    images = [entry for entry, _ in written]
    annotations = [annotation for _, found in written for annotation in found]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    description = "Synthetic scenes in COCO's layout, written by norton_deploy"
    info = {"description": description, "version": "1.0", "seed": seed, "image_sizes": list(image_sizes)}
    licences = [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
    common = {"info": info, "licenses": licences, "images": images}
    boxes = [
        {key: value for key, value in annotation.items() if key not in ("keypoints", "num_keypoints")}
        for annotation in annotations
    ]
    people = [annotation for annotation in annotations if annotation["category_id"] == PERSON]
    person = {**CATEGORIES[0], "keypoints": list(KEYPOINTS), "skeleton": [list(pair) for pair in SKELETON]}
    for name, content in (
        ("instances", {**common, "annotations": boxes, "categories": CATEGORIES}),
        ("person_keypoints", {**common, "annotations": people, "categories": [person]}),
    ):
        with atomic_write(folder / "annotations" / f"{name}_{split}2017.json", "w") as stream:
            json.dump(content, stream)


def write_dataset(
    root: str | Path,
    train_images: int,
    val_images: int,
    *,
    seed: int = 0,
    image_sizes: tuple[int, int] = (160, 256),
    workers: int | None = None,
    progress: bool = False,
) -> None:
    """Write the embedded dataset: train2017/, val2017/ and annotations/ as COCO-2017 has them.

    Every image depends on (seed, split, index) alone: more images or other workers change none of the others.
    Everything is written beside `root` and renamed at the end, so `root` is never half a dataset. With workers,
    a script that calls this needs the usual `if __name__ == "__main__":` guard.

    Args:
        root: folder to make; must not exist or be empty.
        train_images, val_images: how many images each split gets, at least 1.
        image_sizes: smallest and largest side in pixels; height and width are drawn from it independently.
        workers: processes; None takes the number of cores, at most 16.

    Raises:
        UserError: `root` holds something already, or a number is out of range.
    """
    if train_images < 1 or val_images < 1:
        raise UserError(f"embedded dataset: train and val need at least 1 image, got {train_images} and {val_images}")
    if not 32 <= image_sizes[0] <= image_sizes[1]:
        raise UserError(f"embedded dataset: image sizes need 32 <= smallest <= largest, got {image_sizes}")
    if seed < 0:
        raise UserError(f"embedded dataset: the seed must not be negative, got {seed}")
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    with new_folder(root) as partial:
        for split, count in zip(_SPLITS, (train_images, val_images), strict=True):
            _write_split(partial, split, count, seed, image_sizes, workers, progress)

"""Images as a dense model sees them, as a small one does, and as they were annotated; the largest losses first."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from norton_deploy.data.coco import CocoDetection
from norton_deploy.inference.drawing import draw_detections, write_image
from norton_deploy.inference.predictor import Image
from norton_deploy.reporting.deployment import ComparedImage
from norton_deploy.structures import Categories, Detections

FOUND_IOU = 0.5
SHOWN_SCORE = 0.5
LONG_SIDE = 480
QUALITY = 80
LOSSES, GAINS = 6, 2

Entry = Mapping[str, Any]


def compare_images(
    folder: Path,
    dataset: CocoDetection,
    dense: Iterable[Entry],
    small: Iterable[Entry],
    *,
    limit: int | None = None,
    losses: int = LOSSES,
    gains: int = GAINS,
) -> tuple[ComparedImage, ...]:
    """Draw the images in which a small model misses most of what the dense one finds, and those of the opposite.

    An object is found by a detection of its category with a score of at least 0.5 whose box overlaps its own by an IoU
    of at least 0.5; a detection finds one object. Only detections of such scores are drawn.

    Args:
        folder: of the report; .jpg files go into its `pictures`.
        dense, small: COCO results entries of the models (`DetectorEvaluation.results`).
        limit: of the evaluation: the first so many images were seen.
        losses, gains: how many images to take from either end.

    Returns:
        the images, from the largest loss to the largest gain.
    """
    numbers = range(len(dataset))[:limit]
    objects = _by_image(entry for entry in dataset.coco.dataset["annotations"] if not entry["iscrowd"])
    sure = [_by_image(entry for entry in results if entry["score"] >= SHOWN_SCORE) for results in (dense, small)]
    found = {}
    for number, image_id in zip(numbers, dataset.image_ids, strict=False):
        dense_found, small_found = (found_objects(objects[image_id], entries[image_id]) for entries in sure)
        found[number] = dense_found, small_found
    gained = {number: small_found - dense_found for number, (dense_found, small_found) in found.items()}
    many = {number: len(objects[image_id]) for number, image_id in zip(numbers, dataset.image_ids, strict=False)}
    # Of images that differ alike those with more objects show more.
    best = sorted(numbers, key=lambda number: (gained[number], many[number]))[max(0, len(numbers) - gains) :]
    worst = sorted(set(numbers) - set(best), key=lambda number: (gained[number], -many[number]))[:losses]
    shown = worst + best
    pictures = []
    for place, number in enumerate(shown, start=1):
        image_id, pixels = dataset.image_ids[number], dataset.pixels(number)
        files = []
        for name, entries in zip(("dense", "small"), sure, strict=True):
            detections = detections_of(entries[image_id], dataset.categories, pixels.shape[:2])
            files.append(_draw(folder, f"{place}-{name}", pixels, detections, dataset.categories))
        target = dataset.target(number)
        annotated = Detections(
            target["boxes"].numpy(),
            np.ones(len(target["boxes"]), np.float32),
            target["labels"].numpy(),
            pixels.shape[:2],
            target["masks"].numpy().astype(bool) if "masks" in target else None,
            target["keypoints"].numpy() if "keypoints" in target else None,
        )
        files.append(_draw(folder, f"{place}-annotated", pixels, annotated, dataset.categories, scores=False))
        name = dataset.coco.imgs[image_id]["file_name"]
        counts = len(objects[image_id]), *found[number]
        pictures.append(ComparedImage(name, *counts, *files))
    return tuple(pictures)


def found_objects(objects: Sequence[Entry], detections: Sequence[Entry]) -> int:
    """How many annotated objects of one image are found (see `compare_images`), the surest detections first."""
    if not objects or not detections:
        return 0
    detections = sorted(detections, key=lambda entry: -entry["score"])
    boxes = [np.array([entry["bbox"] for entry in entries], float) for entries in (detections, objects)]
    overlaps = np.array(coco_mask.iou(*boxes, [0] * len(objects)))
    kinds = [np.array([entry["category_id"] for entry in entries]) for entries in (detections, objects)]
    overlaps[kinds[0][:, None] != kinds[1]] = 0
    found = 0
    for row in range(len(overlaps)):
        best = int(overlaps[row].argmax())
        if overlaps[row, best] >= FOUND_IOU:
            overlaps[:, best] = 0  # found: no other detection finds it again
            found += 1
    return found


def detections_of(entries: Sequence[Entry], categories: Categories, image_size: tuple[int, int]) -> Detections:
    """COCO results entries of one image, best first, as detections; the opposite of `Detections.to_coco_results`."""
    entries = sorted(entries, key=lambda entry: -entry["score"])
    corners = np.array([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    masks = keypoints = None
    if entries and "segmentation" in entries[0]:
        masks = np.stack([coco_mask.decode(entry["segmentation"]) for entry in entries]).astype(bool)
    if entries and "keypoints" in entries[0]:
        keypoints = np.array([entry["keypoints"] for entry in entries], np.float32).reshape(len(entries), -1, 3)
    label_of_id = categories.label_of_id
    return Detections(
        corners,
        np.array([entry["score"] for entry in entries], np.float32),
        np.array([label_of_id[entry["category_id"]] for entry in entries], np.int64),
        image_size,
        masks,
        keypoints,
    )


def _by_image(entries: Iterable[Entry]) -> defaultdict[int, list[Entry]]:
    found: defaultdict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry["image_id"]].append(entry)
    return found


def _draw(
    folder: Path, name: str, image: Image, found: Detections, categories: Categories, *, scores: bool = True
) -> str:
    """Draw at a long side of 480 pixels; returns the file relative to `folder`."""
    scale = LONG_SIDE / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    shape = [width / image.shape[1], height / image.shape[0]]
    masks = found.masks
    if masks is not None:
        resized = [cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR) for mask in masks]
        masks = np.array(resized, bool).reshape(-1, height, width)
    keypoints = found.keypoints
    if keypoints is not None:
        keypoints = (keypoints * np.array([*shape, 1])).astype(np.float32)
    boxes = (found.boxes * np.array(shape * 2)).astype(np.float32)
    enlarged = Detections(boxes, found.scores, found.labels, (height, width), masks, keypoints)
    scene = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    path = f"pictures/{name}.jpg"
    write_image(
        folder / path, draw_detections(np.asarray(scene, np.uint8), enlarged, categories, scores=scores), QUALITY
    )
    return path

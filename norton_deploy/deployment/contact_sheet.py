"""Some images of a dataset with their annotated boxes and masks, on one sheet."""

from pathlib import Path

import cv2
import numpy as np

from norton_deploy.data.coco import CocoDetection
from norton_deploy.inference.drawing import draw_detections, write_image
from norton_deploy.structures import Detections

CELL = 320
COLUMNS = 4
GROUND = 255


def draw_contact_sheet(path: Path, dataset: CocoDetection, count: int = 12) -> None:
    """Write a .jpg of `count` images, evenly spaced over the split, four in a row, each with its annotations.

    Raises:
        UserError: an image cannot be read, or the file cannot be written.
    """
    step = max(1, len(dataset) // count)
    cells = [_cell(dataset, index) for index in range(0, len(dataset), step)[:count]]
    cells += [np.full((CELL, CELL, 3), GROUND, np.uint8)] * (-len(cells) % COLUMNS)
    rows = [np.hstack(cells[start : start + COLUMNS]) for start in range(0, len(cells), COLUMNS)]
    write_image(path, np.vstack(rows))


def _cell(dataset: CocoDetection, index: int) -> np.ndarray:
    """One annotated image, uint8 RGB [320, 320, 3]."""
    image, target = dataset.pixels(index), dataset.target(index)
    annotated = Detections(
        target["boxes"].numpy(),
        np.ones(len(target["boxes"]), np.float32),
        target["labels"].numpy(),
        (image.shape[0], image.shape[1]),
        target["masks"].numpy().astype(bool) if "masks" in target else None,
        target["keypoints"].numpy() if "keypoints" in target else None,
    )
    drawn = draw_detections(image, annotated, dataset.categories)
    scale = CELL / max(drawn.shape[:2])
    size = [max(1, round(side * scale)) for side in drawn.shape[1::-1]]
    cell = np.full((CELL, CELL, 3), GROUND, np.uint8)
    cell[: size[1], : size[0]] = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA)
    return cell

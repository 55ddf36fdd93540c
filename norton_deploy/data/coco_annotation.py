"""From a mask to COCO's annotation fields: segmentation, area and bbox."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

_SMALLEST_HOLE = 4.0
_SMALLEST_PIECE = 1.0
_TOLERANCE = 0.35


def _join_hole(outline: npt.NDArray[np.float64], hole: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cut from the outline to the hole and back at their closest points: COCO's polygons know no holes."""
    distance = ((outline[:, None] - hole[None]) ** 2).sum(axis=-1)
    at, hole_at = np.unravel_index(int(distance.argmin()), distance.shape)
    around = np.roll(hole, -hole_at, axis=0)
    return np.concatenate([outline[: at + 1], around, around[:1], outline[at:]])


def mask_to_polygons(mask: npt.NDArray[np.bool_], supersampling: int = 1) -> list[npt.NDArray[np.float64]]:
    """Outlines [P, 2] of a mask in pixels, x and y, where pixel i covers [i, i + 1).

    Holes are cut open to the outside; pieces under 1 and holes under 4 square pixels are left out.

    Args:
        mask: bool [H * supersampling, W * supersampling].
        supersampling: mask cells per pixel and axis; the polygons come out in pixels.
    """
    # Doubling every cell's reach to the right and down makes OpenCV's contour, which runs through cell
    # centres, run along cell edges instead.
    padded = np.pad(mask.astype(np.uint8), 1)
    reached = cv2.dilate(padded, np.ones((2, 2), np.uint8), anchor=(1, 1))
    contours, hierarchy = cv2.findContours(reached, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if hierarchy is None:
        return []
    tolerance = _TOLERANCE * supersampling
    cell_area = float(supersampling**2)
    polygons = []
    for index, contour in enumerate(contours):
        if hierarchy[0][index][3] >= 0 or cv2.contourArea(contour) < _SMALLEST_PIECE * cell_area:
            continue
        outline = cv2.approxPolyDP(contour, tolerance, True)[:, 0].astype(float)
        child = hierarchy[0][index][2]
        while child >= 0:
            if cv2.contourArea(contours[child]) >= _SMALLEST_HOLE * cell_area:
                outline = _join_hole(outline, cv2.approxPolyDP(contours[child], tolerance, True)[:, 0].astype(float))
            child = hierarchy[0][child][0]
        if len(outline) >= 3:
            polygons.append((outline - 1.0) / supersampling)
    return polygons


def annotation_of_mask(
    mask: npt.NDArray[np.bool_],
    origin: tuple[int, int],
    image_size: tuple[int, int],
    *,
    supersampling: int = 1,
    crowd: bool = False,
) -> dict[str, Any]:
    """The fields `segmentation` (polygons, or an uncompressed RLE for a crowd), `area` and `bbox` (xywh).

    Args:
        mask: bool [h * supersampling, w * supersampling], a patch of the image.
        origin: x, y of the patch's first pixel.
        image_size: (height, width) of the image.
        supersampling: mask cells per pixel and axis.
        crowd: write an RLE, as COCO does for crowds.
    """
    height, width = image_size
    if crowd:
        rows, columns = (side // supersampling for side in mask.shape)
        share = cv2.resize(mask.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
        whole = np.zeros((height, width), np.uint8, order="F")
        whole[origin[1] : origin[1] + rows, origin[0] : origin[0] + columns] = share >= 0.5
        flat = whole.ravel(order="F")
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]]))[:-1] != 0) if len(flat) else np.array([])
        counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).astype(int).tolist()
        box = coco_mask.toBbox(coco_mask.encode(whole))
        return {
            "segmentation": {"counts": counts, "size": [height, width]},
            "area": float(whole.sum()),
            "bbox": [float(value) for value in box],
        }
    polygons = [polygon + origin for polygon in mask_to_polygons(mask, supersampling)]
    flat_polygons = [np.round(polygon, 2).reshape(-1).tolist() for polygon in polygons]
    area = float(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(flat_polygons, height, width))))
    points = np.concatenate(polygons)
    low, high = points.min(axis=0), points.max(axis=0)
    return {
        "segmentation": flat_polygons,
        "area": area,
        "bbox": [round(float(value), 2) for value in (*low, *(high - low))],
    }

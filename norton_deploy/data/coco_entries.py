"""What a COCO file says about one image, one category or one annotation: every number checked, once, at reading."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from norton_deploy.data.image_file import MAX_PIXELS
from norton_deploy.data.run_lengths import check_near, check_segmentation, decode_segmentation
from norton_deploy.errors import UserError, shown
from norton_deploy.files import path_below
from norton_deploy.structures import Task

Entry = dict[str, Any]

NUM_KEYPOINTS = 17
LARGEST_ID = 2**53 - 1
"""pycocotools keeps ids in float64."""
SMALLEST_BOX_SIDE = 1.0
LARGEST_AREA = 1e10
"""Of pycocotools' ranges of areas, in square pixels."""


class BadEntryError(Exception):
    """An image, category or annotation cannot be used; the message says why."""


def name_of(entry: object, position: int) -> str:
    """What to call an entry in a message: its id, or its place in the list."""
    return shown(entry["id"]) if isinstance(entry, dict) and "id" in entry else f"(entry {position})"


def check_image(entry: Entry, known: Collection[int], folder: Path) -> Path:
    """Check an entry of `images`.

    Args:
        known: ids of the images before it.

    Returns:
        Where its file must be.

    Raises:
        BadEntryError: a field is missing or impossible.
    """
    _require_id(entry, "id", 0)
    _require(entry, ("file_name", "height", "width"))
    if not isinstance(entry["file_name"], str):
        raise BadEntryError(f"'file_name' must be a string, got {shown(entry['file_name'])}")
    if entry["id"] in known:
        raise BadEntryError("there is another image with this id")
    for side in ("height", "width"):
        if type(entry[side]) is not int or entry[side] < 1:
            raise BadEntryError(f"'{side}' must be a positive integer, got {shown(entry[side])}")
    if entry["height"] * entry["width"] > MAX_PIXELS:
        raise BadEntryError(f"'height' x 'width' is more than {MAX_PIXELS} pixels")
    try:
        return path_below(folder, entry["file_name"])
    except UserError as error:
        raise BadEntryError(f"'file_name' {error}") from error


def check_categories(entries: Sequence[Entry], source: str | Path) -> set[int]:
    """Check the list `categories` of the file `source`; returns their ids.

    Raises:
        UserError: an entry has no id or name, or an id that is there already.
    """
    known: set[int] = set()
    for position, entry in enumerate(entries):
        try:
            _require_id(entry, "id", 0)
            if entry["id"] in known:
                raise BadEntryError("there is another category with this id")
            if not isinstance(entry.get("name"), str) or not entry["name"]:
                raise BadEntryError(f"needs a 'name', got {shown(entry.get('name'))}")
        except BadEntryError as error:
            raise UserError(f"{source}: category id {name_of(entry, position)}: {error}; repair the file") from error
        known.add(entry["id"])
    return known


def require_ids(entry: Entry) -> None:
    """Check the three ids of an annotation.

    Raises:
        BadEntryError: one is missing or impossible.
    """
    for name, smallest in (("id", 1), ("image_id", 0), ("category_id", 0)):
        _require_id(entry, name, smallest)


def check_annotation(
    entry: Entry, known: Collection[int], images: Mapping[int, Entry], category_ids: Collection[int], task: Task
) -> None:
    """Check an entry of `annotations` whose ids `require_ids` has seen.

    Coordinates must be finite and may lie outside their image by `MARGIN` image sides at most. A missing `area` is
    computed, of the mask or else of the box, and set.

    Args:
        known: ids of the annotations before it.
        images: id -> sound image.
        task: says which fields there must be.

    Raises:
        BadEntryError: a field is missing or impossible.
    """
    _require(entry, ("bbox",))
    if entry["id"] in known:
        raise BadEntryError("there is another annotation with this id")
    if entry["image_id"] not in images:
        raise BadEntryError(f"points to image id {entry['image_id']}, which is not in the file")
    if entry["category_id"] not in category_ids:
        raise BadEntryError(f"points to category id {entry['category_id']}, which is not in the file")
    image = images[entry["image_id"]]
    _check_box(entry["bbox"], image)
    crowd = entry.get("iscrowd", 0)
    if type(crowd) is not int or crowd not in (0, 1):
        raise BadEntryError(f"'iscrowd' must be 0 or 1, got {shown(crowd)}")
    try:
        if task == "mask":
            _require(entry, ("segmentation",))
            check_segmentation(entry["segmentation"], (image["height"], image["width"]))
        if task == "keypoint":
            _require(entry, ("keypoints", "num_keypoints"))
            _check_keypoints(entry["keypoints"], entry["num_keypoints"], image)
        if entry.get("area") is None:
            entry["area"] = _area(entry, image)
    except UserError as error:
        raise BadEntryError(str(error)) from error
    if not _is_number(entry["area"]) or not 0 <= entry["area"] <= LARGEST_AREA:
        raise BadEntryError(f"'area' must be a number from 0 to {LARGEST_AREA:g}, got {shown(entry['area'])}")


def clipped_box(entry: Entry, image: Entry) -> tuple[float, float, float, float]:
    """A sound annotation's box as xyxy, clipped to its image."""
    x, y, width, height = entry["bbox"]
    x1, x2 = (min(max(side, 0.0), image["width"]) for side in (x, x + width))
    y1, y2 = (min(max(side, 0.0), image["height"]) for side in (y, y + height))
    return x1, y1, x2, y2


def is_degenerate(entry: Entry, image: Entry) -> bool:
    """Whether nothing is trained on a box: it is less than `SMALLEST_BOX_SIDE` wide or high inside its image."""
    x1, y1, x2, y2 = clipped_box(entry, image)
    return bool(x2 - x1 < SMALLEST_BOX_SIDE or y2 - y1 < SMALLEST_BOX_SIDE)


def _area(entry: Entry, image: Entry) -> float:
    if entry.get("segmentation"):
        return float(decode_segmentation(entry["segmentation"], (image["height"], image["width"])).sum())
    return float(entry["bbox"][2] * entry["bbox"][3])


def _check_box(box: Any, image: Entry) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise BadEntryError(f"'bbox' must be four numbers x, y, width, height, got {shown(box)}")
    if box[2] < 0 or box[3] < 0:
        raise BadEntryError(f"'bbox' has a negative width or height: {shown(box)}")
    try:
        check_near([box[0], box[0] + box[2]], image["width"], "'bbox': x")
        check_near([box[1], box[1] + box[3]], image["height"], "'bbox': y")
    except UserError as error:
        raise BadEntryError(str(error)) from error


def _check_keypoints(points: Any, count: Any, image: Entry) -> None:
    if not isinstance(points, list) or len(points) != 3 * NUM_KEYPOINTS or not all(map(_is_number, points)):
        length = len(points) if isinstance(points, list) else "none"
        raise BadEntryError(f"'keypoints' must be {3 * NUM_KEYPOINTS} numbers (x, y, v of 17), got {length}")
    check_near(points[0::3], image["width"], "'keypoints': x")
    check_near(points[1::3], image["height"], "'keypoints': y")
    if not set(points[2::3]) <= {0, 1, 2}:
        raise BadEntryError("'keypoints': v must be 0, 1 or 2")
    if type(count) is not int or not 0 <= count <= NUM_KEYPOINTS:
        raise BadEntryError(f"'num_keypoints' must be an integer from 0 to {NUM_KEYPOINTS}, got {shown(count)}")


def _is_number(value: object) -> bool:
    """An integer or float within what an id may be: finite, and exact in float64 if whole."""
    return type(value) in (int, float) and -LARGEST_ID <= value <= LARGEST_ID  # type: ignore[operator]


def _require(entry: Entry, names: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise BadEntryError(f"expected an object with fields, got {shown(entry)}")
    for name in names:
        if name not in entry:
            raise BadEntryError(f"the field '{name}' is missing")


def _require_id(entry: Entry, name: str, smallest: int) -> None:
    _require(entry, (name,))
    if type(entry[name]) is not int or not smallest <= entry[name] <= LARGEST_ID:
        raise BadEntryError(f"'{name}' must be an integer from {smallest} to 2**53 - 1, got {shown(entry[name])}")

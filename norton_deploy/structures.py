"""The data types that every stage shares: tasks, categories and detections. NumPy only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError, shown
from norton_deploy.masks import MasksInBoxes, Region

if TYPE_CHECKING:
    import supervision

Task = Literal["box", "mask", "keypoint"]
ModelTask = Literal["cls", "box", "mask", "keypoint"]
TASKS: tuple[Task, ...] = ("box", "mask", "keypoint")

# The key under which checkpoints and graphs carry their header.
METADATA_KEY = "norton_deploy"

LARGEST_LABEL = 2**20
COCO_CATEGORY_COUNT = 80
COCO_LARGEST_CATEGORY_ID = 90
MASK_MARGIN = 1 / 28
"""Of a box's side: pasting widens it by one cell of the mask, half on either side; twice that is looked at."""


@dataclass(frozen=True)
class Categories:
    """Model labels, the dataset's category ids and their names, side by side.

    Label 0 is the background and is not listed.

    Attributes:
        labels: model labels, each in 1..num_classes-1.
        ids: COCO category id of each label.
    """

    labels: tuple[int, ...]
    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.labels) == len(self.ids) == len(self.names):
            raise UserError("categories: labels, ids and names must be equally long")
        if not self.labels:
            raise UserError("categories: the list is empty; a detector needs at least one category")
        if len(set(self.labels)) < len(self.labels) or len(set(self.ids)) < len(self.ids):
            raise UserError("categories: labels and ids must each be unique")
        if min(self.labels) < 1:
            raise UserError("categories: labels start at 1, label 0 is the background")
        if max(self.labels) > LARGEST_LABEL:
            raise UserError(f"categories: labels end at {LARGEST_LABEL}, got {shown(max(self.labels))}")

    @classmethod
    def from_coco(cls, categories: Sequence[dict[str, Any]]) -> Categories:
        """Choose labels for the `categories` entry of a COCO annotation file.

        COCO's own 80 categories keep their id as label (91 classes with the unused ids, as torchvision's
        published weights have it); any other set is numbered 1..K in the order of its ids.
        """
        ordered = sorted(categories, key=lambda category: int(category["id"]))
        ids = tuple(int(category["id"]) for category in ordered)
        names = tuple(str(category["name"]) for category in ordered)
        is_coco = len(ids) == COCO_CATEGORY_COUNT and ids[-1] == COCO_LARGEST_CATEGORY_ID
        return cls(ids if is_coco else tuple(range(1, len(ids) + 1)), ids, names)

    @property
    def num_classes(self) -> int:
        """Number of classes of a model with these labels, background included."""
        return max(self.labels) + 1

    @property
    def label_of_id(self) -> dict[int, int]:
        """COCO category id -> model label."""
        return dict(zip(self.ids, self.labels, strict=True))

    @property
    def id_of_label(self) -> dict[int, int]:
        """Model label -> COCO category id."""
        return dict(zip(self.labels, self.ids, strict=True))

    @property
    def name_of_label(self) -> dict[int, str]:
        """Model label -> name."""
        return dict(zip(self.labels, self.names, strict=True))

    def to_list(self) -> list[dict[str, int | str]]:
        """JSON form: a list of {"label", "id", "name"}."""
        return [
            {"label": label, "id": category_id, "name": name}
            for label, category_id, name in zip(self.labels, self.ids, self.names, strict=True)
        ]

    @classmethod
    def from_list(cls, entries: Sequence[dict[str, Any]]) -> Categories:
        """Inverse of `to_list`.

        Raises:
            UserError: no list of such entries.
        """
        sound = isinstance(entries, list | tuple) and all(isinstance(entry, dict) for entry in entries)
        for name, kind in (("label", int), ("id", int), ("name", str)):
            sound = sound and all(type(entry.get(name)) is kind for entry in entries)
        if not sound:
            raise UserError("categories: expected a list of entries with integers 'label' and 'id' and a text 'name'")
        return cls(*(tuple(entry[name] for entry in entries) for name in ("label", "id", "name")))


class _Masks:
    """`Detections.masks`: given as an array or in boxes, read as an array; pasted when it is first read."""

    def __set__(self, found: Detections, masks: npt.NDArray[np.bool_] | MasksInBoxes | None) -> None:
        vars(found)["masks"] = masks

    def __get__(self, found: Detections | None, owner: type[Detections] | None = None) -> npt.NDArray[np.bool_] | None:
        if found is None:
            return None  # the field's default
        masks = vars(found)["masks"]
        if isinstance(masks, MasksInBoxes):
            masks = vars(found)["masks"] = masks.paste()
        return masks


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, best first.

    Attributes:
        boxes: float32 [N, 4], xyxy in pixels of the image.
        scores: float32 [N], 0..1, descending.
        labels: int64 [N], model labels (`Categories` translates them to COCO ids).
        image_size: (height, width) of the image in pixels.
        masks: bool [N, H, W] or None. May be given as `MasksInBoxes`, which are pasted when this is read.
        keypoints: float32 [N, K, 3] or None; x, y in pixels and the keypoint's score.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    image_size: tuple[int, int]
    masks: _Masks = _Masks()  # one for all, it keeps nothing itself
    keypoints: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        count = len(self.boxes)
        expected = {"boxes": (count, 4), "scores": (count,), "labels": (count,)}
        if self.has_masks:
            expected["masks"] = (count, *self.image_size)
        if self.keypoints is not None:
            expected["keypoints"] = (count, self.keypoints.shape[1] if self.keypoints.ndim == 3 else -1, 3)
        for field, shape in expected.items():
            actual = vars(self)[field].shape
            if actual != shape:
                raise ValueError(f"Detections.{field}: expected shape {shape}, got {actual}")

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def has_masks(self) -> bool:
        """Whether there are masks; asking does not paste them."""
        return vars(self)["masks"] is not None

    def mask_crop(self, index: int) -> tuple[Region, npt.NDArray[np.bool_]]:
        """The part of the image that a detection's mask reaches, and its pixels there, bool [rows, columns]."""
        masks = vars(self)["masks"]
        if isinstance(masks, MasksInBoxes):
            return masks.crop(index)
        (height, width), box = self.image_size, self.boxes[index]
        margin = MASK_MARGIN * (box[2:] - box[:2]) + 2
        x1, y1 = np.floor(box[:2] - margin).clip(0).astype(int)
        x2, y2 = np.ceil(box[2:] + margin).clip(0, (width, height)).astype(int)
        region = slice(y1, y2), slice(x1, x2)
        return region, masks[index][region]

    def __getitem__(self, index: Any) -> Detections:
        """The detections that a NumPy index (mask, slice or integer array) selects."""
        return replace(
            self,
            boxes=self.boxes[index],
            scores=self.scores[index],
            labels=self.labels[index],
            masks=vars(self)["masks"][index] if self.has_masks else None,
            keypoints=None if self.keypoints is None else self.keypoints[index],
        )

    def to_supervision(self, categories: Categories) -> supervision.Detections:
        """The same detections for drawing and tracking with supervision; `class_id` is the COCO id."""
        import supervision

        id_of_label, name_of_label = categories.id_of_label, categories.name_of_label
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            confidence=self.scores,
            class_id=np.array([id_of_label[int(label)] for label in self.labels], dtype=int),
            mask=self.masks,
            data={"class_name": np.array([name_of_label[int(label)] for label in self.labels], dtype=str)},
        )

    def to_coco_results(self, image_id: int, categories: Categories) -> list[dict[str, Any]]:
        """COCO results entries (bbox xywh; `segmentation` as compressed RLE; `keypoints` flat x, y, 1).

        Keypoint results carry the detection's score, as COCO's evaluation expects.
        """
        id_of_label = categories.id_of_label
        results: list[dict[str, Any]] = []
        whole = np.zeros(self.image_size if self.has_masks else (0, 0), np.uint8, order="F")
        for index in range(len(self)):
            x1, y1, x2, y2 = (float(value) for value in self.boxes[index])
            entry: dict[str, Any] = {
                "image_id": int(image_id),
                "category_id": id_of_label[int(self.labels[index])],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(self.scores[index]),
            }
            if self.has_masks:
                from pycocotools import mask as coco_mask

                region, pixels = self.mask_crop(index)
                whole[region] = pixels
                run_lengths = coco_mask.encode(whole)
                whole[region] = 0
                run_lengths["counts"] = run_lengths["counts"].decode("ascii")
                entry["segmentation"] = run_lengths
            if self.keypoints is not None:
                points = self.keypoints[index].copy()
                points[:, 2] = 1.0
                entry["keypoints"] = points.reshape(-1).astype(float).tolist()
            results.append(entry)
        return results

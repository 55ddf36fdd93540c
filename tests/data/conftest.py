"""A hand-written COCO dataset whose every number is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def keypoints(*labelled: tuple[int, float, float, int]) -> list[float]:
    """51 numbers from (index, x, y, v) of the labelled keypoints."""
    flat = [0.0] * 51
    for index, x, y, visibility in labelled:
        flat[3 * index : 3 * index + 3] = [x, y, visibility]
    return flat


class HandMade:
    """COCO content to edit before it is written; images are 40 high and 60 wide."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[dict[str, Any]] = [
            {"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 60} for number in (7, 3, 5)
        ]
        self.categories: list[dict[str, Any]] = [
            {"id": 1, "name": "person", "supercategory": "person", "keypoints": ["nose"], "skeleton": []},
            {"id": 37, "name": "sports ball", "supercategory": "sports"},
        ]
        square = [[10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]]
        run_lengths = {"counts": [0, 80, 2320], "size": [40, 60]}
        self.annotations: list[dict[str, Any]] = [
            self.annotation(1, 3, 1, [10, 10, 20, 10], square, keypoints=keypoints((0, 15, 12, 2), (5, 20, 15, 1))),
            self.annotation(2, 3, 37, [0, 0, 2, 40], run_lengths),
            self.annotation(3, 3, 1, [0, 0, 2, 40], run_lengths, iscrowd=1),
            self.annotation(4, 7, 1, [50, 30, 20, 20], [[50, 30, 60, 30, 60, 40, 50, 40]]),
            self.annotation(5, 7, 37, [5, 5, 0.4, 9], [[5, 5, 5.4, 5, 5.4, 14]]),
        ]

    @staticmethod
    def annotation(
        number: int, image: int, category: int, box: list[float], segmentation: Any, **more: Any
    ) -> dict[str, Any]:
        points = more.pop("keypoints", [0] * 51)
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": float(box[2] * box[3]),
            "iscrowd": 0,
            "segmentation": segmentation,
            "keypoints": points,
            "num_keypoints": sum(v > 0 for v in points[2::3]),
            **more,
        }

    def write(self, *, pictures: bool = True) -> Path:
        """Both splits and both annotation files with the same content."""
        for split in ("train", "val"):
            folder = self.root / f"{split}2017"
            folder.mkdir(parents=True, exist_ok=True)
            for number in (3, 5, 7) if pictures else ():
                columns = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
                pixels = np.stack([columns, 255 - columns, np.full_like(columns, 100)], axis=-1)
                Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
            annotations = self.root / "annotations"
            annotations.mkdir(exist_ok=True)
            content = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
            for name in ("instances", "person_keypoints"):
                (annotations / f"{name}_{split}2017.json").write_text(json.dumps(content))
        return self.root


@pytest.fixture
def hand_made(tmp_path: Path) -> HandMade:
    return HandMade(tmp_path / "coco")

"""A tiny COCO ground truth: three images, two categories, masks as polygons, 17 keypoints."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

# the tests share the detector that `oracle.py` also runs as a script
sys.path.insert(0, str(Path(__file__).parent))


def ground_truth(keypoint_count: int = 17) -> COCO:
    """Three images (the last without objects); boxes from small to large, categories 3 and 7."""
    generator = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    for image_id, category_id, (x, y, w, h) in (
        (10, 3, (10.0, 12.0, 20.0, 25.0)),
        (10, 7, (60.0, 40.0, 60.0, 70.0)),
        (11, 3, (20.0, 30.0, 120.0, 130.0)),
        (11, 3, (150.0, 10.0, 30.0, 20.0)),
    ):
        points = np.stack(
            [
                generator.uniform(x, x + w, keypoint_count),
                generator.uniform(y, y + h, keypoint_count),
                np.full(keypoint_count, 2),
            ],
            axis=1,
        )
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "keypoints": points.reshape(-1).tolist(),
                "num_keypoints": keypoint_count,
            }
        )
    coco = COCO()
    names = [f"point{index}" for index in range(keypoint_count)]
    coco.dataset = {
        "images": [{"id": image_id, "height": 200, "width": 220} for image_id in (10, 11, 12)],
        "categories": [
            {"id": 3, "name": "cat", "keypoints": names},
            {"id": 7, "name": "dog", "keypoints": names},
        ],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


@pytest.fixture
def coco_gt() -> COCO:
    return ground_truth()


@pytest.fixture
def make_ground_truth() -> Callable[..., COCO]:
    return ground_truth

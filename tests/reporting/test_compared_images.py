"""Which images of two models are shown beside each other, and what is in them."""

from pathlib import Path
from typing import Any

import cv2
import pytest

from norton_deploy.data.coco import CocoDetection
from norton_deploy.reporting.compared_images import compare_images, detections_of, found_objects


def found(x: float, score: float = 0.9, category: int = 1) -> dict[str, Any]:
    return {"bbox": [x, 0.0, 10.0, 10.0], "score": score, "category_id": category}


def test_a_detection_finds_one_object_of_its_category() -> None:
    objects = [found(0.0), found(4.0), found(50.0, category=2)]
    assert found_objects(objects, [found(1.0)]) == 1
    assert found_objects(objects, [found(0.0), found(1.0, 0.8)]) == 2, "the second takes what the first has left"
    assert found_objects(objects, [found(50.0)]) == 0, "another category"
    assert found_objects(objects, [found(7.0)]) == 1 and found_objects(objects, [found(20.0)]) == 0
    assert found_objects([], [found(0.0)]) == found_objects(objects, []) == 0


@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_the_largest_loss_comes_first(tiny_coco: Path, tmp_path: Path, task: Any) -> None:
    dataset = CocoDetection(tiny_coco, "val", task)
    truth = [
        {**entry, "score": 0.9, "segmentation": dataset.coco.annToRLE(entry)}
        for entry in dataset.coco.dataset["annotations"]
        if not entry["iscrowd"]
    ]
    if task == "keypoint":
        truth = [{key: value for key, value in entry.items() if key != "segmentation"} for entry in truth]
    counts = {image: sum(entry["image_id"] == image for entry in truth) for image in dataset.image_ids}
    worst = max(counts, key=lambda image: counts[image])
    gained = next(image for image in reversed(dataset.image_ids) if counts[image] and image != worst)
    dense = [entry for entry in truth if entry["image_id"] != gained]
    small = [entry | {"score": 0.4} if entry["image_id"] == worst else entry for entry in truth]
    shown = compare_images(tmp_path, dataset, dense, small, losses=1, gains=1)
    assert [image.name for image in shown] == [dataset.coco.imgs[image]["file_name"] for image in (worst, gained)]
    assert (shown[0].objects, shown[0].dense_found, shown[0].small_found) == (counts[worst], counts[worst], 0)
    assert (shown[1].dense_found, shown[1].small_found) == (0, counts[gained])
    for image in shown:
        drawn = [cv2.imread(str(tmp_path / file)) for file in (image.dense, image.small, image.annotated)]
        assert {max(picture.shape) for picture in drawn} == {480}
        assert (drawn[0] != drawn[1]).any() and (drawn[0] != drawn[2]).any()
    assert len(compare_images(tmp_path, dataset, dense, small, limit=2)) == 2
    alike = compare_images(tmp_path, dataset, truth, truth, losses=1, gains=1)
    assert [image.objects for image in alike] == sorted(counts.values())[-2:], "of images alike those with most objects"


def test_results_come_back_as_the_detections_that_they_were(tiny_coco: Path) -> None:
    dataset = CocoDetection(tiny_coco, "val", "mask")
    image_id = next(iter(dataset.coco.imgToAnns))
    entries = [entry | {"score": 0.5, "segmentation": dataset.coco.annToRLE(entry)}
               for entry in dataset.coco.imgToAnns[image_id]]  # fmt: skip
    image = dataset.coco.imgs[image_id]
    detections = detections_of(entries, dataset.categories, (image["height"], image["width"]))
    again = detections.to_coco_results(image_id, dataset.categories)
    assert [entry["category_id"] for entry in again] == [entry["category_id"] for entry in entries]
    assert again[0]["bbox"] == pytest.approx(entries[0]["bbox"], abs=1e-4)
    assert detections.masks is not None and detections.masks.shape[1:] == detections.image_size

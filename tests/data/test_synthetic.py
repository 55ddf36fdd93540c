"""The embedded dataset: layout, ground truth, determinism."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from norton_deploy.data.coco import decode_segmentation
from norton_deploy.data.coco_annotation import annotation_of_mask, mask_to_polygons
from norton_deploy.data.synthetic import CATEGORIES, draw_scene, write_dataset
from norton_deploy.data.synthetic.canvas import SUPERSAMPLING, Canvas
from norton_deploy.data.synthetic.people import KEYPOINTS, REACH, SKELETON, draw_person
from norton_deploy.data.synthetic.scene import SyntheticVideo
from norton_deploy.data.synthetic.shapes import SHAPES
from norton_deploy.errors import UserError
from norton_deploy.structures import COCO_CATEGORY_COUNT

SIZE = (120, 150)


def load(root: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "annotations" / name).read_text())
    return content


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [draw_scene((10, index), SIZE) for index in range(40)]


def test_layout_and_fields(tiny_coco: Path) -> None:
    assert sorted(path.name for path in tiny_coco.iterdir()) == ["annotations", "train2017", "val2017"]
    for split, count in (("train", 6), ("val", 4)):
        instances = load(tiny_coco, f"instances_{split}2017.json")
        people = load(tiny_coco, f"person_keypoints_{split}2017.json")
        assert set(instances) == {"info", "licenses", "images", "annotations", "categories"} == set(people)
        assert instances["images"] == people["images"] and len(people["images"]) == count
        for image in instances["images"]:
            pixels = cv2.imread(str(tiny_coco / f"{split}2017" / image["file_name"]))
            assert pixels is not None and pixels.shape == (image["height"], image["width"], 3)
            assert min(pixels.shape[:2]) >= 112 and max(pixels.shape[:2]) <= 144
        assert [category["id"] for category in people["categories"]] == [1]
        assert people["categories"][0]["keypoints"] == list(KEYPOINTS)
        assert people["categories"][0]["skeleton"] == [list(pair) for pair in SKELETON]
        ids = [annotation["id"] for annotation in instances["annotations"]]
        assert ids == list(range(1, len(ids) + 1))
        persons = {a["id"]: a for a in instances["annotations"] if a["category_id"] == 1}
        assert set(persons) == {annotation["id"] for annotation in people["annotations"]}
        for annotation in people["annotations"]:
            assert annotation["bbox"] == persons[annotation["id"]]["bbox"]
            visibility = annotation["keypoints"][2::3]
            assert len(annotation["keypoints"]) == 51 and set(visibility) <= {0, 1, 2}
            assert annotation["num_keypoints"] == sum(value > 0 for value in visibility)


def test_categories_are_cocos_own() -> None:
    names = {1: "person", 13: "stop sign", 28: "umbrella", 37: "sports ball", 38: "kite", 85: "clock"}
    assert {category["id"]: category["name"] for category in CATEGORIES} == names
    assert len(CATEGORIES) < COCO_CATEGORY_COUNT


def test_boxes_areas_and_masks_agree(scenes: list[Any]) -> None:
    for scene in scenes:
        for annotation in scene.annotations:
            mask = decode_segmentation(annotation["segmentation"], SIZE)
            assert abs(mask.sum() - annotation["area"]) <= 1e-6
            tight = np.array(coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask))))
            assert np.abs(tight - annotation["bbox"]).max() <= 2.0
            x, y, width, height = annotation["bbox"]
            assert x >= 0 and y >= 0 and x + width <= SIZE[1] and y + height <= SIZE[0]
            assert isinstance(annotation["segmentation"], dict) == bool(annotation["iscrowd"])


def test_masks_hold_only_what_is_visible(scenes: list[Any]) -> None:
    overlap = total = 0
    for scene in scenes:
        covered = sum(decode_segmentation(a["segmentation"], SIZE).astype(int) for a in scene.annotations)
        if scene.annotations:
            overlap += int((covered > 1).sum())
            total += int((covered > 0).sum())
    assert overlap / total < 0.005  # nothing but rounding at shared borders


def test_visible_keypoints_lie_on_their_person(scenes: list[Any]) -> None:
    on_mask = hidden_off_mask = visible = hidden = 0
    for scene in scenes:
        for annotation in scene.annotations:
            if "keypoints" not in annotation:
                continue
            mask = decode_segmentation(annotation["segmentation"], SIZE)
            grown = cv2.dilate(mask, np.ones((3, 3), np.uint8))
            for x, y, visibility in np.reshape(annotation["keypoints"], (17, 3)):
                assert visibility > 0 or (x, y) == (0, 0)
                if visibility == 2:
                    visible += 1
                    on_mask += int(grown[int(y), int(x)])
                elif visibility == 1:
                    hidden += 1
                    hidden_off_mask += not mask[int(y), int(x)]
    assert visible > 200 and hidden > 30 and hidden_off_mask > 0
    assert on_mask == visible


def test_variety(scenes: list[Any]) -> None:
    annotations = [annotation for scene in scenes for annotation in scene.annotations]
    assert {annotation["category_id"] for annotation in annotations} == {1, *SHAPES}
    assert any(annotation["iscrowd"] for annotation in annotations)
    assert any(not scene.annotations for scene in scenes)
    assert max(len(scene.annotations) for scene in scenes) >= 6
    areas = np.array([annotation["area"] for annotation in annotations])
    assert (areas < 32**2).mean() > 0.3 and ((areas >= 32**2) & (areas < 96**2)).mean() > 0.1
    large = [a["area"] for index in range(20) for a in draw_scene((10, index), (256, 256)).annotations]
    assert max(large) > 96**2


def test_scene_depends_on_its_seed_alone() -> None:
    first = draw_scene((1, 2), SIZE)
    draw_scene(7, SIZE)
    again = draw_scene((1, 2), SIZE)
    assert np.array_equal(first.image, again.image) and first.annotations == again.annotations
    assert first.image.dtype == np.uint8 and first.image.shape == (*SIZE, 3)
    assert not np.array_equal(first.image, draw_scene((1, 3), SIZE).image)


def test_video_moves_smoothly_and_returns_to_its_start() -> None:
    video = SyntheticVideo(5, SIZE, objects=6)
    start, soon, later = (video.frame(t) for t in (0.0, 0.04, 2.0))
    assert len(start.annotations) >= 3
    centres = [
        {a["id"]: np.array(a["bbox"][:2]) + np.array(a["bbox"][2:]) / 2 for a in scene.annotations}
        for scene in (start, soon, later)
    ]
    both = set(centres[0]) & set(centres[1])
    assert both and max(np.abs(centres[0][n] - centres[1][n]).max() for n in both) < 6.0
    assert not np.array_equal(start.image, later.image)
    assert np.array_equal(video.frame(0.0).image, start.image)


def test_more_images_leave_the_others_alone(tiny_coco: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "more", 70, 1, seed=3, image_sizes=(112, 144), workers=2)  # in processes
    for image in COCO(str(tiny_coco / "annotations/instances_train2017.json")).dataset["images"]:
        name = f"train2017/{image['file_name']}"
        assert (tiny_coco / name).read_bytes() == (tmp_path / "more" / name).read_bytes()


def test_write_dataset_refuses_what_it_cannot_do(tiny_coco: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds something already"):
        write_dataset(tiny_coco, 1, 1)
    with pytest.raises(UserError, match="at least 1 image"):
        write_dataset(tmp_path / "a", 0, 1)
    with pytest.raises(UserError, match="image sizes"):
        write_dataset(tmp_path / "a", 1, 1, image_sizes=(200, 100))
    with pytest.raises(UserError, match="seed"):
        write_dataset(tmp_path / "a", 1, 1, seed=-1)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_no_half_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cv2, "imwrite", fail)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "data", 2, 1, image_sizes=(64, 64))
    assert not (tmp_path / "data").exists()
    write_dataset(tmp_path / "data", 2, 1, image_sizes=(64, 64))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("supersampling", [2, 4])
def test_rectangle_with_a_hole_becomes_an_exact_polygon(supersampling: int) -> None:
    mask = np.zeros((20, 30), bool)
    mask[3:15, 4:24] = True
    mask[6:10, 8:14] = False
    fine = mask.repeat(supersampling, axis=0).repeat(supersampling, axis=1)
    annotation = annotation_of_mask(fine, (5, 2), (40, 50), supersampling=supersampling)
    decoded = decode_segmentation(annotation["segmentation"], (40, 50))
    expected = np.zeros((40, 50), np.uint8)
    expected[2:22, 5:35] = mask
    assert np.array_equal(decoded, expected)
    assert annotation["bbox"] == [9, 5, 20, 12]
    assert annotation["area"] == 12 * 20 - 4 * 6


def test_crowd_is_an_uncompressed_rle() -> None:
    mask = np.zeros((6, 8), bool)
    mask[0:3, 0:2] = True
    mask[4:6, 5:8] = True
    annotation = annotation_of_mask(mask, (0, 0), (6, 8), crowd=True)
    assert annotation["segmentation"]["size"] == [6, 8]
    assert annotation["segmentation"]["counts"][0] == 0  # the first run counts zeros
    assert np.array_equal(decode_segmentation(annotation["segmentation"], (6, 8)), mask)
    assert annotation["bbox"] == [0, 0, 8, 6] and annotation["area"] == 12


def test_no_polygon_of_nothing() -> None:
    assert mask_to_polygons(np.zeros((5, 5), bool)) == []


def test_canvas_covers_exactly_the_pixels_of_a_polygon() -> None:
    canvas = Canvas(np.array([10.0, 10.0]), 6.0)
    canvas.polygon(np.array([[7.0, 8.0], [12.0, 8.0], [12.0, 11.0], [7.0, 11.0]]), (200, 100, 50), part=3)
    layer = canvas.layer()
    alpha = np.zeros_like(layer.alpha)
    alpha[8 - layer.top : 11 - layer.top, 7 - layer.left : 12 - layer.left] = 1.0
    assert np.abs(layer.alpha - alpha)[alpha == 1].max() == 0.0
    assert np.abs(layer.alpha - alpha).sum() <= 0.5 * SUPERSAMPLING * 8  # OpenCV also draws the edge itself
    assert canvas.part_at(np.array([9.0, 9.0])) == 3 and canvas.part_at(np.array([5.0, 9.0])) == 0


def test_person_stays_within_its_reach_and_faces_the_viewer_the_right_way() -> None:
    facing_left_is_right = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        canvas = Canvas(np.array([200.0, 200.0]), 1.3 * REACH * 100)
        points = draw_person(canvas, rng, np.array([200.0, 200.0]), 100.0)
        rows, columns = np.nonzero(canvas.pixels[..., 3])
        far = np.hypot(columns / SUPERSAMPLING + canvas.left - 200, rows / SUPERSAMPLING + canvas.top - 200)
        assert far.max() <= REACH * 100 + 1.0
        eyes_seen = points[1, 2] == 2 and points[2, 2] == 2
        upright = points[0, 1] < points[11:13, 1].min() - 20
        if eyes_seen and upright:
            facing_left_is_right += points[1, 0] > points[2, 0]
            assert points[1, 0] > points[2, 0]  # seen from the front, the left eye is on the right
    assert facing_left_is_right >= 10

"""norton predict: images in, annotated images and COCO JSON out."""

import json

import cv2
import numpy as np
import pytest

from norton_deploy.commands import run
from norton_deploy.inference import drawing
from norton_deploy.inference.drawing import draw_detections, image_ids
from norton_deploy.structures import Categories, Detections


@pytest.fixture
def folder(tmp_path, lamp):
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "a.png"), lamp((64, 96), (20, 10, 60, 50)))
    cv2.imwrite(str(images / "b.png"), np.zeros((50, 40, 3), np.uint8))
    return images


def test_predict_writes_pictures_and_coco_json(graph, folder, tmp_path, capsys):
    from pycocotools.coco import COCO

    model = graph(task="mask")
    out = tmp_path / "out"
    assert run("predict", ["--model", str(model), "--images", str(folder), "--out", str(out), "--json", "-"]) == 0
    coco = COCO(str(out / "detections.json"))
    assert coco.loadCats([7])[0]["name"] == "lamp"
    assert [image["height"] for image in coco.loadImgs([1, 2])] == [64, 50]
    [annotation] = coco.loadAnns(coco.getAnnIds())
    assert annotation["image_id"] == 1 and annotation["score"] == 1
    np.testing.assert_allclose(annotation["bbox"], [20, 10, 40, 40], atol=2)
    assert coco.annToMask(annotation)[30, 25:35].all()
    drawn, plain = (cv2.imread(str(path)) for path in sorted(out.glob("*.jpg")))
    assert (np.abs(drawn.astype(int) - lampless(drawn)).max(axis=2) > 40).sum() > 100
    assert plain.max() < 10
    assert '"images": 2' in capsys.readouterr().out


def lampless(image: np.ndarray) -> np.ndarray:
    """The input of the picture: white where the lamp was, black elsewhere."""
    plain = np.zeros_like(image, int)
    plain[10:50, 20:60] = 255
    return plain


def test_predict_mistakes_are_one_line(graph, folder, tmp_path, capsys):
    model = str(graph())
    (folder / "c.jpg").write_text("no image")
    for images, message in [(tmp_path / "absent", "no images"), (folder / "c.jpg", "c.jpg: not a picture")]:
        assert run("predict", ["--model", model, "--images", str(images), "--out", str(tmp_path / "o")]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error


def test_a_bad_image_costs_only_itself(graph, folder, tmp_path, capsys):
    (folder / "a_bad.jpg").write_text("no image")
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    arguments = ["--model", str(graph()), "--images", str(folder), "--out", str(out)]
    assert run("predict", [*arguments, "--json", str(figures)]) == 1
    assert "1 of 3 images were left out, the first because: " in capsys.readouterr().err
    found = json.loads((out / "detections.json").read_text())
    assert [image["id"] for image in found["images"]] == [1, 3] and len(found["annotations"]) == 1
    assert json.loads(figures.read_text())["bad_images"] == 1
    assert run("predict", arguments) == 1  # the folder has results
    assert "is there already" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_found(graph, folder, tmp_path, monkeypatch):
    pictures = iter([drawing.write_image])

    def write(path, image):
        try:
            next(pictures)(path, image)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(drawing, "write_image", write)
    assert run("predict", ["--model", str(graph()), "--images", str(folder), "--out", str(tmp_path / "o")]) == 130
    assert json.loads((tmp_path / "o" / "detections.json").read_text())["annotations"]


def test_colours_tell_neighbouring_categories_apart():
    boxes = np.array([[10, 40, 40, 70], [60, 40, 90, 70]], np.float32)
    found = Detections(boxes, np.ones(2, np.float32), np.array([1, 2]), (100, 100))
    drawn = draw_detections(np.zeros((100, 100, 3), np.uint8), found, Categories((1, 2), (1, 22), ("a", "b")))
    assert drawn[70, 25].any() and (drawn[70, 25] != drawn[70, 75]).any()  # the boxes' lower edges


def test_a_label_at_the_edge_is_whole():
    image, categories = np.zeros((100, 100, 3), np.uint8), Categories((1,), (1,), ("wide name",))
    inside = Detections(np.array([[20, 40, 50, 70]], np.float32), np.ones(1, np.float32), np.ones(1, int), (100, 100))
    at_edge = Detections(np.array([[80, 0, 99, 30]], np.float32), np.ones(1, np.float32), np.ones(1, int), (100, 100))
    white = [int((draw_detections(image, found, categories).min(axis=2) > 200).sum()) for found in (inside, at_edge)]
    assert white[0] == white[1] > 0  # pixels of the text


def test_image_ids_follow_cocos_names(tmp_path):
    assert image_ids([tmp_path / "000000000139.jpg", tmp_path / "000000000025.jpg"]) == [139, 25]
    assert image_ids([tmp_path / "1.jpg", tmp_path / "01.jpg"]) == [1, 2]
    assert image_ids([tmp_path / "139.jpg", tmp_path / "a.jpg"]) == [1, 2]


def test_drawing_keeps_the_colour_order_and_the_input():
    image = np.full((60, 80, 3), (200, 10, 10), np.uint8)
    keypoints = np.zeros((1, 17, 3), np.float32)
    keypoints[0, 5] = (30, 30, 2.0)  # left and right shoulder, joined by an edge of COCO's skeleton
    keypoints[0, 6] = (50, 30, 2.0)
    keypoints[0, 7] = (40, 55, -1.0)  # not visible
    box = np.array([[20, 20, 60, 50]], np.float32)
    found = Detections(box, np.ones(1, np.float32), np.ones(1, np.int64), (60, 80), keypoints=keypoints)
    drawn = draw_detections(image, found, Categories((1,), (1,), ("person",)))
    assert (image == (200, 10, 10)).all()
    np.testing.assert_array_equal(drawn[55, 75], (200, 10, 10))  # untouched, so not swapped to blue
    assert drawn[30, 40, 1] > 200 and drawn[30, 40, 0] < 50  # the green edge
    np.testing.assert_array_equal(drawn[56, 40], (200, 10, 10))  # the hidden point
    np.testing.assert_array_equal(draw_detections(image, found[:0], Categories((1,), (1,), ("person",))), image)


def test_no_images_are_a_mistake(graph, tmp_path, capsys):
    assert run("predict", ["--model", str(graph()), "--out", str(tmp_path / "o"), "--images"]) == 1
    assert "--images: expected" in capsys.readouterr().err

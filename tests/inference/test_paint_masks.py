"""Masks painted inside their boxes look as supervision blends them over the whole frame."""

from pathlib import Path

import numpy as np
import pytest
import supervision as sv

from benchmarks import drawing
from norton_deploy.inference.drawing import compose_panels, draw_detections, paint_masks
from norton_deploy.masks import MasksInBoxes
from norton_deploy.structures import Categories, Detections


def test_masks_in_their_boxes_look_as_over_the_whole_frame():
    found = drawing.draw_objects((300, 400), 12)
    image = np.random.default_rng(1).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    colours = found.labels - 1
    expected = sv.MaskAnnotator(opacity=0.45).annotate(image.copy(), found.to_supervision(drawing.CATEGORIES), colours)
    painted = image.copy()
    palette = sv.ColorPalette.DEFAULT
    paint_masks(painted, found, [palette.by_idx(int(colour)).as_bgr() for colour in colours])
    difference = np.abs(painted.astype(int) - expected)
    assert difference.max() <= 1 and (painted != image).any(axis=2).mean() > 0.2  # rounding apart


def test_no_pixel_that_pasting_set_is_left_out():
    rng = np.random.default_rng(0)
    low = rng.uniform(-30, 180, (40, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.5, 220, (40, 2))], axis=1).astype(np.float32)
    for mask_paste in ("whole_pixels", "subpixel"):
        boxed = MasksInBoxes(np.ones((40, 28, 28), np.float32), boxes, (200, 200), mask_paste)
        pasted = boxed.paste()
        for given in (boxed, pasted):
            found = Detections(boxes, np.ones(40, np.float32), np.ones(40, np.int64), (200, 200), given)
            for index, mask in enumerate(pasted):
                scene = np.zeros((200, 200, 3), np.uint8)
                paint_masks(scene, found[index : index + 1], [(255, 255, 255)])
                np.testing.assert_array_equal(scene.any(axis=2), mask)


def test_masks_are_pasted_when_somebody_asks(monkeypatch):
    rng = np.random.default_rng(2)
    boxes = np.sort(rng.uniform(-9, 70, (6, 2, 2)), axis=1).reshape(6, 4).astype(np.float32)
    boxed = MasksInBoxes(rng.random((6, 28, 28), np.float32), boxes, (50, 60))
    found = Detections(boxes, np.linspace(1, 0.5, 6, dtype=np.float32), np.ones(6, np.int64), (50, 60), boxed)
    pasted = Detections(found.boxes, found.scores, found.labels, (50, 60), boxed.paste())
    monkeypatch.setattr(MasksInBoxes, "paste", lambda self: pytest.fail("pasted"))
    some = found[found.scores > 0.6]
    assert some.has_masks and len(some) == 4
    image = np.zeros((50, 60, 3), np.uint8)
    drawn = draw_detections(image, found, Categories((1,), (1,), ("a",)))
    np.testing.assert_array_equal(drawn, draw_detections(image, pasted, Categories((1,), (1,), ("a",))))
    assert found.to_coco_results(3, Categories((1,), (1,), ("a",))) == pasted.to_coco_results(
        3, Categories((1,), (1,), ("a",))
    )
    monkeypatch.undo()
    np.testing.assert_array_equal(found.masks, pasted.masks)
    with pytest.raises(ValueError, match="masks: expected shape"):
        Detections(found.boxes, found.scores, found.labels, (50, 61), boxed)


def test_the_image_itself_stays_as_it_was():
    found = drawing.draw_objects((120, 300), 2)
    image = np.full((120, 300, 3), 7, np.uint8)
    drawn = draw_detections(image, found, drawing.CATEGORIES)
    assert (image == 7).all() and (drawn != 7).any()


def test_panels_hold_what_is_drawn_alone():
    found = drawing.draw_objects((300, 401), 3)
    image = np.random.default_rng(3).integers(0, 256, (300, 401, 3)).astype(np.uint8)
    names = drawing.CATEGORIES
    canvas = compose_panels(image, [found, found[:1]], [names, names], ["one", "two"], None, [])
    assert canvas.shape == (348, 802, 3)
    np.testing.assert_array_equal(canvas[24:324, :401], draw_detections(image, found, names))
    np.testing.assert_array_equal(canvas[24:324, 401:], draw_detections(image, found[:1], names))
    assert (canvas[:24] > 200).any() and (canvas[324:] > 200).any()  # their texts


def test_the_benchmark_runs(tmp_path: Path):
    settings = drawing.Settings(tmp_path / "drawing.json", (300, 400), objects=3, frames=2, rounds=3)
    assert drawing.main(settings) == 0
    assert "| processor |" in (tmp_path / "drawing.md").read_text()

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import (
    IOU_TYPES,
    KEYPOINT_METRICS,
    OVERLAP_METRICS,
    metrics_table,
    results_of_type,
    score_coco,
    table3_scores,
)
from norton_deploy.structures import TASKS

ALL_TYPES = ("bbox", "segm", "keypoints")


def perfect_results(coco_gt: COCO) -> list[dict]:
    return [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "segmentation": coco_gt.annToRLE(annotation),
            "keypoints": annotation["keypoints"],
            "score": 0.9,
        }
        for annotation in coco_gt.dataset["annotations"]
    ]


def disturbed_results(coco_gt: COCO) -> list[dict]:
    """Moved boxes and masks, one false detection, one object missed, mixed scores."""
    from pycocotools import mask as coco_mask

    generator = np.random.default_rng(1)
    results = perfect_results(coco_gt)[:-1]
    results.append(copy.deepcopy(results[0]) | {"image_id": 12})
    for entry in results:
        shift = generator.uniform(-4, 4, 2)
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x + shift[0], y + shift[1], w * 1.1, h * 0.95]
        mask = np.zeros((200, 220), np.uint8, order="F")
        mask[int(y) : int(y + 0.9 * h), int(x + shift[0]) : int(x + w)] = 1
        run_lengths = coco_mask.encode(mask)
        entry["segmentation"] = {"size": run_lengths["size"], "counts": run_lengths["counts"].decode("ascii")}
        points = np.array(entry["keypoints"]).reshape(-1, 3)
        points[:, :2] += generator.normal(0, 3, (len(points), 2))
        entry["keypoints"] = points.reshape(-1).tolist()
        entry["score"] = float(generator.uniform())
    return results


def direct_stats(coco_gt: COCO, results_file: str, iou_type: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco_gt, coco_gt.loadRes(results_file), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@pytest.mark.parametrize("iou_type", ALL_TYPES)
def test_perfect_predictions_score_one(coco_gt, iou_type):
    scores = score_coco(coco_gt, {iou_type: perfect_results(coco_gt)})[iou_type].metrics
    names = KEYPOINT_METRICS if iou_type == "keypoints" else OVERLAP_METRICS
    assert list(scores) == names
    for name, value in scores.items():
        if name != "AR1":  # one detection cannot find both objects of image 11
            assert value == pytest.approx(1.0), name


@pytest.mark.parametrize("iou_type", ALL_TYPES)
def test_numbers_equal_a_direct_run_on_the_results_file(coco_gt, make_ground_truth, tmp_path, iou_type):
    results = disturbed_results(coco_gt)
    scores = score_coco(coco_gt, {iou_type: results})[iou_type].metrics
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_of_type(results, iou_type)))
    assert list(scores.values()) == direct_stats(make_ground_truth(), str(path), iou_type)
    assert 0.05 < scores["AP"] < 0.95


def test_results_are_not_changed(coco_gt):
    results = disturbed_results(coco_gt)
    before = copy.deepcopy(results)
    score_coco(coco_gt, dict.fromkeys(ALL_TYPES, results))
    assert results == before


@pytest.mark.parametrize("iou_type", ALL_TYPES)
def test_no_detections_score_zero(coco_gt, iou_type):
    scores = score_coco(coco_gt, {iou_type: []})[iou_type].metrics
    assert scores["AP"] == 0.0 and scores["AP50"] == 0.0


def test_sizes_without_objects_are_minus_one(coco_gt):
    scores = score_coco(coco_gt, {"bbox": []}, image_ids=[12])["bbox"].metrics
    assert set(scores.values()) == {-1.0}


def test_only_the_given_images_count(coco_gt):
    results = [entry for entry in perfect_results(coco_gt) if entry["image_id"] == 10]
    assert score_coco(coco_gt, {"bbox": results}, image_ids=[10])["bbox"].metrics["AP"] == pytest.approx(1.0)
    assert score_coco(coco_gt, {"bbox": results})["bbox"].metrics["AP"] < 0.9


@pytest.mark.parametrize(("field", "value"), [("image_id", 99), ("category_id", 5)])
def test_unknown_ids_are_named(coco_gt, field, value):
    results = perfect_results(coco_gt)
    results[1][field] = value
    with pytest.raises(UserError, match=f"{field} {value}"):
        score_coco(coco_gt, {"bbox": results})


def test_missing_field_is_named(coco_gt):
    with pytest.raises(UserError, match="segmentation"):
        score_coco(coco_gt, {"segm": [{"image_id": 10, "category_id": 3, "score": 1.0, "bbox": [0, 0, 1, 1]}]})


@pytest.mark.parametrize("task", TASKS)
def test_table_marks_what_table_3_lists(coco_gt, task):
    scores = score_coco(coco_gt, {iou_type: disturbed_results(coco_gt) for iou_type in IOU_TYPES[task]})
    metrics = {iou_type: score.metrics for iou_type, score in scores.items()}
    table = metrics_table(task, metrics)
    ap, ar = table3_scores(task, metrics)
    own = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}[task]
    assert f"| {own} | AP | {ap:.4f} | AP in Table III |" in table
    name = "AR" if task == "keypoint" else "AR100"
    assert f"| {own} | {name} | {ar:.4f} | AR in Table III |" in table
    assert table.count("Table III") == 2


def test_nothing_is_printed(coco_gt, capsys):
    score_coco(coco_gt, {"bbox": perfect_results(coco_gt)})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("iou_type", ALL_TYPES)
def test_the_categories_average_to_the_whole(coco_gt, iou_type):
    score = score_coco(coco_gt, {iou_type: disturbed_results(coco_gt)})[iou_type]
    assert [(entry.id, entry.name, entry.objects) for entry in score.categories] == [(3, "cat", 3), (7, "dog", 1)]
    assert np.mean([entry.ap for entry in score.categories]) == pytest.approx(score.metrics["AP"])
    assert np.mean(score.precision["0.50"]) == pytest.approx(score.metrics["AP50"], abs=1e-4)
    assert np.mean(score.precision["0.75"]) == pytest.approx(score.metrics["AP75"], abs=1e-4)


def test_a_category_without_objects_has_no_score_and_other_images_do_not_count(coco_gt):
    score = score_coco(coco_gt, {"bbox": perfect_results(coco_gt)}, image_ids=[11])["bbox"]
    cat, dog = score.categories
    assert (cat.objects, cat.ap) == (2, pytest.approx(1.0))
    assert (dog.objects, dog.ap) == (0, None)
    assert score_coco(coco_gt, {"bbox": []}, image_ids=[12])["bbox"].precision == {"0.50": (), "0.75": ()}

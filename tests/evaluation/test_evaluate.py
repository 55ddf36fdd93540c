import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle import Oracle
from pycocotools.cocoeval import COCOeval

from norton_deploy.data.coco import CocoDetection
from norton_deploy.evaluation.coco_metrics import IOU_TYPES
from norton_deploy.evaluation.evaluate import evaluate_detector, write_results
from norton_deploy.structures import TASKS, Categories, Detections

ORACLE_SCRIPT = Path(__file__).with_name("oracle.py")


@pytest.mark.parametrize("task", TASKS)
def test_perfect_detections_score_one(tiny_coco, task):
    dataset = CocoDetection(tiny_coco, "train", task)
    evaluation = evaluate_detector(Oracle(dataset), dataset, batch_size=2, progress=False)
    assert tuple(evaluation.metrics) == IOU_TYPES[task]
    for iou_type, metrics in evaluation.metrics.items():
        if (task, iou_type) != ("keypoint", "bbox"):  # people without labelled keypoints have no answer
            assert metrics["AP"] == pytest.approx(1.0, abs=0.02), iou_type


@pytest.mark.parametrize("task", TASKS)
def test_numbers_equal_pycocotools_on_the_written_files(tiny_coco, tmp_path, task):
    dataset = CocoDetection(tiny_coco, "train", task)
    evaluation = evaluate_detector(Oracle(dataset, shift=2.0), dataset, progress=False)
    files = write_results(tmp_path / "results.json", evaluation.results, dataset)
    assert files[IOU_TYPES[task][-1]].name == "results.json"
    assert set(files) == set(IOU_TYPES[task])
    for iou_type, path in files.items():
        truth = CocoDetection(tiny_coco, "train", task).coco
        with contextlib.redirect_stdout(io.StringIO()):
            direct = COCOeval(truth, truth.loadRes(str(path)), iou_type)
            direct.evaluate()
            direct.accumulate()
            direct.summarize()
        assert list(evaluation.metrics[iou_type].values()) == direct.stats.tolist()


def test_only_the_first_images(tiny_coco):
    dataset = CocoDetection(tiny_coco, "train", "box")
    evaluation = evaluate_detector(Oracle(dataset), dataset, limit=2, progress=False)
    assert {entry["image_id"] for entry in evaluation.results} <= set(dataset.image_ids[:2])
    assert evaluation.metrics["bbox"]["AP50"] == pytest.approx(1.0, abs=0.02)


def test_categories_that_the_ground_truth_has_not_are_left_out(tiny_coco):
    dataset = CocoDetection(tiny_coco, "train", "box")
    own, oracle = dataset.categories, Oracle(dataset)
    dataset.categories = Categories((*own.labels, 90), (*own.ids, 999), (*own.names, "unicorn"))

    def sees_unicorns(images):
        found = oracle(images)
        return [replace(one, labels=np.where(np.arange(len(one)) == 0, 90, one.labels)) for one in found]

    with pytest.warns(UserWarning, match="detections are of categories that the ground truth has not"):
        evaluation = evaluate_detector(sees_unicorns, dataset, progress=False)
    assert {entry["category_id"] for entry in evaluation.results} <= set(own.ids)
    assert 0 < evaluation.metrics["bbox"]["AP"] < 1


def test_a_detector_that_finds_nothing_scores_zero(tiny_coco):
    dataset = CocoDetection(tiny_coco, "val", "box")

    def blind(images):
        empty = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
        return [Detections(*empty, image.shape[:2]) for image in images]

    assert evaluate_detector(blind, dataset, progress=False).metrics["bbox"]["AP"] == 0.0


@pytest.mark.slow
def test_two_processes_see_every_image_once(tiny_coco, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ORACLE_SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tiny_coco), str(tmp_path)], env=environment, check=True)
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["calls"] for report in reports] == [3, 2]  # 5 images: none is repeated to fill up
    dataset = CocoDetection(tiny_coco, "train", "box")
    alone = evaluate_detector(Oracle(dataset, shift=1.5), dataset, limit=5, progress=False)
    for report in reports:
        assert report["metrics"] == alone.metrics
        assert report["results"] == alone.results

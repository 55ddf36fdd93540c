"""The static detectors in eager mode against torchvision's own."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from reduced_detectors import IMAGE_SIZE, as_model_input, blobs, reduced_detector
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from norton_deploy.errors import UserError
from norton_deploy.export.static_rcnn import TARGETS, GraphSettings, StaticRCNN, Target
from norton_deploy.masks import MasksInBoxes
from norton_deploy.structures import TASKS, Task

BASE = GraphSettings(IMAGE_SIZE, batch=2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_same_detections_as_torchvision(task: Task, target: Target) -> None:
    model, images = reduced_detector(task), blobs(2, seed=5)
    outputs = StaticRCNN(copy.deepcopy(model), replace(BASE, target=target))(images)
    assert outputs["nms_converged"].all() and outputs["candidates_complete"].all()
    for index, expected in enumerate(model(as_model_input(images))):
        count = int(outputs["num_detections"][index])
        assert count == len(expected["boxes"]) == 20
        assert torch.equal(outputs["labels"][index].to(torch.int64), expected["labels"])
        torch.testing.assert_close(outputs["boxes"][index], expected["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(outputs["scores"][index], expected["scores"], atol=1e-5, rtol=0)
        if task == "mask":
            pasted = MasksInBoxes(outputs["masks"][index].numpy(), expected["boxes"].numpy(), IMAGE_SIZE).paste()
            assert np.mean(pasted != (expected["masks"][:, 0].numpy() > 0.5)) < 1e-4
        if task == "keypoint":
            points = outputs["keypoints"][index]
            torch.testing.assert_close(points[..., :2], expected["keypoints"][..., :2], atol=1e-2, rtol=0)
            torch.testing.assert_close(points[..., 2], expected["keypoints_scores"], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_padded_rows_are_zero(task: Task) -> None:
    model = copy.deepcopy(reduced_detector(task))
    model.roi_heads.score_thresh = 0.9
    outputs = StaticRCNN(model, replace(BASE, max_detections=60))(blobs(2, seed=5))
    for index, count in enumerate(outputs["num_detections"].tolist()):
        assert 0 < count < 60
        for name in ("boxes", "scores", "labels", "masks", "keypoints"):
            if name in outputs:
                assert outputs[name][index, count:].eq(0).all() and outputs[name][index, :count].ne(0).any()


@torch.no_grad()
def test_nothing_found_and_more_rows_than_candidates() -> None:
    model = copy.deepcopy(reduced_detector("box"))
    model.roi_heads.score_thresh = 0.99999
    outputs = StaticRCNN(model, replace(BASE, candidates=30, max_detections=50))(blobs(2))
    assert outputs["num_detections"].tolist() == [0, 0] and outputs["boxes"].shape == (2, 50, 4)
    assert outputs["boxes"].eq(0).all()


@torch.no_grad()
def test_too_few_candidates_are_reported() -> None:
    outputs = StaticRCNN(copy.deepcopy(reduced_detector("box")), replace(BASE, candidates=25))(blobs(2))
    assert not outputs["candidates_complete"].any()


@torch.no_grad()
def test_float_input_is_the_same_graph() -> None:
    images = blobs(2)
    planes = torch.stack(as_model_input(images))
    by_bytes = StaticRCNN(copy.deepcopy(reduced_detector("box")), BASE)(images)
    by_planes = StaticRCNN(copy.deepcopy(reduced_detector("box")), replace(BASE, input_dtype="float32"))(planes)
    torch.testing.assert_close(by_bytes["boxes"], by_planes["boxes"], atol=1e-3, rtol=0)


@torch.no_grad()
def test_a_convolutional_box_head_gets_channels_first() -> None:
    model = copy.deepcopy(reduced_detector("box"))
    heads = model.roi_heads
    heads.box_head = FastRCNNConvFCHead((48, 5, 5), [16], [64]).eval()
    static = StaticRCNN(model, BASE).box_head
    pooled = torch.randn(7, 48, 5, 5, generator=torch.Generator().manual_seed(0))
    logits, deltas = heads.box_predictor(heads.box_head(pooled))
    found = static(pooled.permute(0, 2, 3, 1))
    torch.testing.assert_close(found[0], logits)
    torch.testing.assert_close(found[1], deltas)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="training mode"):
        StaticRCNN(copy.deepcopy(reduced_detector("box")).train(), BASE)
    with pytest.raises(UserError, match="candidates: 5000"):
        StaticRCNN(copy.deepcopy(reduced_detector("box")), replace(BASE, target="tensorrt", candidates=5000))
    with pytest.raises(UserError, match="target"):
        GraphSettings(IMAGE_SIZE, target="openvino")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--max-detections: expected at least 1"):
        GraphSettings(IMAGE_SIZE, max_detections=0)

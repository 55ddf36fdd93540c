import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax

from norton_deploy.compression.compress import compress
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.training.batches import Batch
from norton_deploy.training.distillation import DetectorImitation
from norton_deploy.training.head_imitation import (
    class_divergence,
    delta_distance,
    heatmap_divergence,
    mask_divergence,
    proposal_labels,
)

SETTINGS = DetectorSettings(
    num_classes=3,
    num_keypoints=17,
    backbone=BackboneSettings("resnet18", norm="group", trainable_layers=5, fpn_channels=16),
    roi=RoiSettings(box_features=16, mask_channels=(8,), keypoint_channels=(8,)),
    image=ImageSettings(64, 64),
    rpn=RpnSettings(anchor_sizes=(8, 16, 32, 48, 64)),
)
HEADS = {
    "box": {"class_imitation", "box_imitation"},
    "mask": {"class_imitation", "box_imitation", "mask_imitation"},
    "keypoint": {"class_imitation", "box_imitation", "keypoint_imitation"},
}


def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def divergence(student, teacher):
    """KL of two rows of logits, by its definition."""
    own, wanted = log_softmax(student), log_softmax(teacher)
    return float((np.exp(wanted) * (wanted - own)).sum())


def test_class_scores_and_heatmaps_by_their_definition():
    student, teacher = numbers(5, 4), numbers(5, 4, seed=1)
    expected = np.mean([divergence(*rows) for rows in zip(student.numpy(), teacher.numpy(), strict=True)])
    assert float(class_divergence(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(class_divergence(teacher + 3, teacher)) == pytest.approx(0, abs=1e-6)
    student, teacher = numbers(2, 3, 4, 5), numbers(2, 3, 4, 5, seed=1)
    pairs = zip(student.numpy().reshape(6, 20), teacher.numpy().reshape(6, 20), strict=True)
    assert float(heatmap_divergence(student, teacher)) == pytest.approx(
        np.mean([divergence(*p) for p in pairs]), rel=1e-5
    )


def test_masks_by_their_definition_and_in_the_own_class_only():
    student, teacher, labels = numbers(3, 4, 2, 2), numbers(3, 4, 2, 2, seed=1), torch.tensor([1, 3, 2])
    terms = []
    for row, label in enumerate(labels):
        own, wanted = expit(student[row, label].numpy()), expit(teacher[row, label].numpy())
        terms.append(wanted * np.log(wanted / own) + (1 - wanted) * np.log((1 - wanted) / (1 - own)))
    assert float(mask_divergence(student, teacher, labels)) == pytest.approx(np.mean(terms), rel=1e-4)
    student[0, 2] += 5  # another class than its own
    assert float(mask_divergence(student, teacher, labels)) == pytest.approx(np.mean(terms), rel=1e-4)


def test_box_deltas_count_as_much_as_the_teacher_sees_their_class():
    teacher, student = torch.zeros(2, 12), torch.zeros(2, 12)
    student[0, 4:8] = 1.0  # class 1 of the first proposal is off by 1 in each of four numbers
    student[1, 0:4] = 9.0  # background has no box
    logits = torch.tensor([[0.0, math.log(2.0), 0.0], [0.0, 0.0, 0.0]])  # class 1: 0.5
    assert float(delta_distance(student, teacher, logits)) == pytest.approx(0.5 * 4 * (1 - 0.5 / 9) / 2, rel=1e-5)


def test_labels_are_those_of_the_box_that_overlaps_most():
    proposals = [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.zeros(0, 4)]
    targets = [
        {"boxes": torch.tensor([[19.0, 19, 30, 30], [0, 0, 9, 9]]), "labels": torch.tensor([2, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    assert proposal_labels(proposals, targets).tolist() == [1, 2]


def detector(task):
    torch.manual_seed(0)
    return SETTINGS.build(task).train()


def batch(task):
    torch.manual_seed(1)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    if task == "mask":
        target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
        target["masks"][0, 8:50, 8:40] = 1
    if task == "keypoint":
        target["keypoints"] = torch.rand(1, 17, 3) * 30 + 10
        target["keypoints"][..., 2] = 1
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    return Batch(images, [dict(target), dict(target)], [1, 2])


@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_twins_have_nothing_to_imitate_and_a_compressed_one_has(task):
    teacher = detector(task)
    student = detector(task)
    imitation = DetectorImitation(student, teacher, None, head_weight=2.0)
    losses = imitation(student, batch(task))
    assert HEADS[task] <= set(losses)
    assert "imitation" not in losses
    assert all(float(losses[name].detach()) == pytest.approx(0, abs=1e-4) for name in HEADS[task])

    layer = {
        "box": "backbone.body.layer2.0.conv2",
        "mask": "roi_heads.mask_head.0.0",
        "keypoint": "roi_heads.keypoint_head.0",
    }
    student = compress(detector(task), CompressionPlan("rcnn", {layer[task]: 1}), starts=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    losses = DetectorImitation(student, teacher, None, head_weight=2.0)(student, batch(task))
    wanted = sum(losses[name] for name in HEADS[task])
    assert float(wanted.detach()) > 1e-3
    wanted.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {"roi_heads.box_predictor.cls_score.weight", "backbone.body.conv1.weight"} <= reached
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.roi_heads.modules())


def test_a_batch_without_positive_proposals_has_no_mask_to_imitate():
    student, teacher = detector("mask"), detector("mask")
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }
    images = Batch([torch.rand(3, 64, 64)], [empty], [1])
    losses = DetectorImitation(student, teacher, None, head_weight=1.0)(student, images)
    assert float(losses["mask_imitation"].detach()) == 0
    assert torch.isfinite(sum(losses.values()))

import pytest
import torch
from torch import nn

from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task
from norton_deploy.training.detector_training import keep_boxes_in_float32

BOX = [20.3, 10.7, 121.9, 140.2]  # no coordinate is a bfloat16


def tiny_detector(task: Task) -> nn.Module:
    settings = DetectorSettings(
        num_classes=2,
        backbone=BackboneSettings("resnet18", norm="group", trainable_layers=5, fpn_channels=16),
        image=ImageSettings(160, 160),
        roi=RoiSettings(box_features=16, mask_channels=(16,), keypoint_channels=(16,)),
    )
    torch.manual_seed(0)
    return settings.build(task).train()


def seen_boxes(detector: nn.Module) -> list[torch.Tensor]:
    """Proposals of one training step under autocast, annotated boxes among them."""
    seen: list[torch.Tensor] = []
    pool = detector.get_submodule("roi_heads.box_roi_pool")
    pool.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[1]))
    target = {"boxes": torch.tensor([BOX]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector([torch.rand(3, 160, 160)], [target])
    assert all(torch.isfinite(loss) for loss in losses.values())
    return seen


def test_annotated_boxes_are_not_rounded_under_autocast() -> None:
    detector = tiny_detector("box")
    keep_boxes_in_float32(detector)
    [boxes] = seen_boxes(detector)
    assert boxes.dtype == torch.float32
    assert (boxes - torch.tensor(BOX)).abs().amax(dim=1).min() < 1e-4


def test_without_it_torchvision_rounds_them() -> None:
    """The reason for the module: should torchvision change, it can go."""
    [boxes] = seen_boxes(tiny_detector("box"))
    assert (boxes.float() - torch.tensor(BOX)).abs().amax(dim=1).min() > 0.05


@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_every_head_of_the_task_is_found(task: Task) -> None:
    detector = tiny_detector(task)
    keep_boxes_in_float32(detector)
    hooked = {name for name, module in detector.named_modules() if module._forward_hooks}
    own = {"box": set(), "mask": {"roi_heads.mask_predictor"}, "keypoint": {"roi_heads.keypoint_predictor"}}[task]
    assert hooked == {"rpn.head", "roi_heads.box_predictor"} | own

"""What both kinds of settings offer: sizes, images as the model takes them, the model itself."""

import pytest
import torch
from torch import nn
from torchvision.transforms.v2.functional import resize

from norton_deploy.errors import UserError
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import (
    BackboneSettings,
    Detectron2Settings,
    ImageSettings,
    RoiSettings,
    RpnSettings,
)
from norton_deploy.models.detectors import DetectorSettings

CLASSIFIER = ClassifierSettings("resnet18", 3, image_size=(32, 48), image_mean=(0.1, 0.2, 0.3), image_std=(1, 2, 4))
DETECTOR = DetectorSettings(
    num_classes=3,
    backbone=BackboneSettings("resnet18", fpn_channels=16),
    rpn=RpnSettings(post_nms=(9, 7)),
    roi=RoiSettings(box_features=16),
    image=ImageSettings(64, 80, (32, 48)),
)


def test_sizes_regions_and_architecture_by_one_name() -> None:
    assert (CLASSIFIER.input_size, CLASSIFIER.proposals, CLASSIFIER.architecture) == ((32, 48), 0, "resnet18")
    assert (DETECTOR.input_size, DETECTOR.proposals, DETECTOR.architecture) == ((64, 64), 7, "resnet18")


def test_a_classifiers_images_are_resized_and_normalised() -> None:
    images = [torch.rand(3, 40, 30), torch.rand(3, 32, 48)]
    prepared = CLASSIFIER.prepare(images)
    assert prepared.tensors.shape == (2, 3, 32, 48) and prepared.image_sizes == [(32, 48)] * 2
    shift, scale = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1, 2, 4]).view(3, 1, 1)
    torch.testing.assert_close(prepared.tensors[1], (images[1] - shift) / scale)
    torch.testing.assert_close(prepared.tensors[0], (resize(images[0], [32, 48], antialias=True) - shift) / scale)


@pytest.mark.parametrize("layers", [Detectron2Settings(), Detectron2Settings(image_resize="antialiased")])
def test_a_detectors_images_are_what_its_own_transform_makes_of_them(layers: Detectron2Settings) -> None:
    settings = DetectorSettings(image=DETECTOR.image, detectron2=layers, roi=DETECTOR.roi, backbone=DETECTOR.backbone)
    images = [torch.rand(3, 50, 60), torch.rand(3, 96, 64)]
    expected, _ = settings.build("box").eval().transform(images)
    prepared = settings.prepare(images)
    assert torch.equal(prepared.tensors, expected.tensors) and prepared.image_sizes == expected.image_sizes


def test_a_task_of_the_other_kind_is_refused() -> None:
    assert isinstance(CLASSIFIER.build("cls"), nn.Module)
    with pytest.raises(UserError, match="task 'box': resnet18 is a classifier"):
        CLASSIFIER.build("box")
    with pytest.raises(UserError, match="task 'cls': expected one of box, mask, keypoint"):
        DETECTOR.build("cls")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DetectorSettings(num_classes=1), "num_classes: expected at least 2"),
        (lambda: DetectorSettings(num_keypoints=0), "^num_keypoints: expected at least 1, got 0"),
        (lambda: BackboneSettings("vgg16_bn"), "backbone 'vgg16_bn': a detector needs a resnet"),
        (lambda: BackboneSettings(fpn_channels=0), r"backbone\.fpn_channels: expected at least 1, got 0"),
        (lambda: BackboneSettings(trainable_layers=6), r"backbone\.trainable_layers: expected 0..5, got 6"),
        (lambda: RpnSettings(anchor_sizes=(8, 16)), r"rpn\.anchor_sizes: expected one for each of 5 levels, got 2"),
        (lambda: RoiSettings(box_features=0), r"roi\.box_features: expected at least 1, got 0"),
        (lambda: ImageSettings(0), r"image\.min_size: expected 1 to 8192, got 0"),
        (lambda: ImageSettings(90, 80), r"image\.min_size 90 is larger than max_size 80"),
    ],
)
def test_impossible_settings_are_named_with_their_group(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, class_categories, save_checkpoint
from norton_deploy.commands.gradcam import main
from norton_deploy.compression.compress import compress
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.gradcam import (
    Question,
    explained_layers,
    gradcam_maps,
    map_correlation,
    shared_detection,
)

CLASSIFIER = ClassifierSettings("resnet18", 3, image_size=(64, 64))
DETECTOR = DetectorSettings(
    num_classes=4,
    backbone=BackboneSettings("resnet18", norm="batch", fpn_channels=16, trainable_layers=0),
    roi=RoiSettings(box_features=32),
    image=ImageSettings(96, 96),
)
PLAN = CompressionPlan("resnet18", {"layer2.0.conv2": 1, "layer3.0.conv2": 1}, {"layer4": 400})


def test_maps_follow_from_activations_and_gradients() -> None:
    """Behind average pooling and a linear layer the gradient of a channel is its weight over the number of pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    pixels = torch.randn(1, 3, 7, 9)
    question = Question(pixels, np.zeros((6, 8, 3), np.float32), label=2)
    with torch.no_grad():
        weighted = torch.einsum("k,khw->hw", model[3].weight[2], model[0](pixels)[0]).clamp(min=0)
    expected = (weighted - weighted.min()) / (weighted.max() - weighted.min())
    np.testing.assert_allclose(gradcam_maps(model, question, ["0"])["0"], expected[:6, :8].numpy(), atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(UserError, match="no layer 'layer9'"):
        gradcam_maps(CLASSIFIER.build().eval(), question, ["layer9"])


def test_correlation_of_maps() -> None:
    first = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    assert map_correlation(first, 2 * first + 1) == pytest.approx(1)
    assert map_correlation(first, -first) == pytest.approx(-1)
    assert map_correlation(first, np.zeros_like(first)) is None


def test_three_levels_of_every_kind_of_model() -> None:
    assert explained_layers(CLASSIFIER.build()) == ["layer2", "layer3", "layer4"]
    assert explained_layers(DETECTOR.build("box"))[0] == "backbone.body.layer2"
    vgg = ClassifierSettings("vgg16_bn", 10, image_size=(32, 32)).build()
    layers = explained_layers(vgg)
    assert layers == ["features.22", "features.32", "features.42"]
    assert all(isinstance(vgg.get_submodule(layer), nn.ReLU) for layer in layers)


def detections(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


def test_the_shared_detection_is_the_surest_that_all_make() -> None:
    square, moved, far = [0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [50.0, 50.0, 60.0, 60.0]
    dense = detections([far, square, far], [1, 2, 3], [0.9, 0.6, 0.5])
    small = detections([moved, far, far], [2, 3, 2], [0.7, 0.4, 0.9])
    models = [lambda _images, found=found: [found] for found in (dense, small)]
    box, label = shared_detection(models, torch.zeros(3, 8, 8))  # type: ignore[arg-type, misc]
    assert (box.tolist(), label) == ([square], 2)
    none = detections([far], [9], [0.9])
    assert shared_detection([models[0], lambda _images: [none]], torch.zeros(3, 8, 8)) is None  # type: ignore[list-item]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two images; a classifier and a detector, each with a copy of itself and a compressed form."""
    root = tmp_path_factory.mktemp("gradcam")
    (root / "images").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (80, 96, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
    torch.manual_seed(0)
    models = {"cls": CLASSIFIER.build(), "box": DETECTOR.build("box")}
    for task, model in models.items():
        settings = CLASSIFIER if task == "cls" else DETECTOR
        header = CheckpointHeader(task, settings, None, class_categories("abc"))  # type: ignore[arg-type]
        for name in ("dense", "copy"):
            save_checkpoint(root / f"{task}-{name}.safetensors", model, header)
        small = compress(model, PLAN, starts=1)
        save_checkpoint(root / f"{task}-small.safetensors", small, header.made_by("test", plan=PLAN))
    return root


def run(files, task: str, *more: str) -> dict:
    compressed = [str(files / f"{task}-{name}.safetensors") for name in ("copy", "small")]
    argv = ["--model", str(files / f"{task}-dense.safetensors"), "--compressed", *compressed]
    out, figures = files / f"{task}.png", files / f"{task}.json"
    assert main([*argv, "--out", str(out), "--json", str(figures), "--overwrite", *more]) == 0
    with Image.open(out) as picture:
        assert picture.width > picture.height > 100
    return json.loads(figures.read_text())


def test_classifiers(files) -> None:
    figures = run(files, "cls", "--images", str(files / "images"))
    assert figures["images"] == 2 and list(figures["correlation"]) == ["cls-copy", "cls-small"]
    assert list(figures["correlation"]["cls-copy"]) == ["layer2", "layer3", "layer4"]
    assert all(level["mean"] == 1 for level in figures["correlation"]["cls-copy"].values() if level["maps"])
    assert any(level["mean"] < 0.99 for level in figures["correlation"]["cls-small"].values() if level["maps"])


def test_a_frozen_detector_and_a_chosen_box(files) -> None:
    more = ["--images", str(files / "images" / "0.png"), "--layers", "backbone.body.layer3"]
    figures = run(files, "box", *more, "--box", "10", "10", "60", "70")
    assert figures["correlation"]["box-copy"] == {"backbone.body.layer3": {"mean": 1.0, "std": 0.0, "maps": 1}}
    assert figures["correlation"]["box-small"]["backbone.body.layer3"]["mean"] < 1


def test_mistakes_are_named(files, monkeypatch) -> None:
    with pytest.raises(UserError, match="--box: goes with one image"):
        run(files, "box", "--images", str(files / "images"), "--box", "1", "1", "9", "9")
    with pytest.raises(UserError, match="is a cls model of other categories"):
        run(files, "box", "--images", str(files / "images"), "--compressed", str(files / "cls-copy.safetensors"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_grad_cam", None)
        with pytest.raises(UserError, match=r"pip install 'norton-deploy\[explain\]'"):
            run(files, "cls", "--images", str(files / "images"))

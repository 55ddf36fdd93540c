"""One's own torchvision detectors: names of their categories, wrappers' prefixes, and what cannot be read."""

import argparse
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from norton_deploy.checkpoints.checkpoint import read_header
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.checkpoints.torchvision_weights import current_names, identify, read_tensors
from norton_deploy.commands import run
from norton_deploy.data.category_list import categories_of_model, read_categories
from norton_deploy.data.synthetic import CATEGORIES
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.inference.loading import load_predictor
from norton_deploy.models.detector_parts import BackboneSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.parity.export_checked import open_detector
from norton_deploy.structures import Categories
from norton_deploy.training.initial_weights import initial_detector, training_categories

ANNOTATIONS = '{"categories": [{"id": 7, "name": "nut"}, {"id": 3, "name": "bolt"}, {"id": 9, "name": "washer"}]}'


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Faster R-CNN of three categories as torchvision's training scripts save it from several processes."""
    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    tensors = {f"module.{name}": tensor.half() for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("own") / "own.pth"
    torch.save({"model": tensors, "args": argparse.Namespace(lr=0.02), "epoch": 3}, path)
    (path.parent / "instances.json").write_text(ANNOTATIONS)
    return path


def test_categories_image_size_and_prefixes(own: Path) -> None:
    opened = open_model(str(own), categories=own.parent / "instances.json", image_size=(320, 256))
    assert opened.header.task == "box"
    assert opened.header.categories.id_of_label == {1: 3, 2: 7, 3: 9}
    assert opened.header.categories.name_of_label == {1: "bolt", 2: "nut", 3: "washer"}
    image = opened.header.detector.image
    assert (image.min_size, image.max_size) == (256, 320)
    batch, _ = opened.model.transform([torch.rand(3, 100, 200)])
    assert batch.image_sizes == [(160, 320)]
    weights = read_tensors(own)
    body = opened.model.get_submodule("backbone.body.layer4.2.conv3")
    assert torch.equal(body.weight, weights["module.backbone.body.layer4.2.conv3.weight"].float())
    assert open_model(str(own)).header.categories.names == ("class 1", "class 2", "class 3")
    with pytest.raises(UserError, match=r"--image-size 0 128: image\.min_size: expected 1 to 8192, got 0"):
        open_model(str(own), image_size=(0, 128))


def test_import_model_writes_what_was_opened(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.safetensors"
    categories = str(own.parent / "instances.json")
    arguments = ["--model", str(own), "--categories", categories, "--image-size", "320", "256", "--out", str(out)]
    assert run("import_model", arguments) == 0
    header = read_header(out)
    assert header.categories.names == ("bolt", "nut", "washer")
    assert (header.detector.image.min_size, header.detector.image.max_size) == (256, 320)
    assert header.lineage[0]["source"] == str(own)


def test_a_list_of_names_and_the_wrong_number(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("bolt\n\nnut\n")
    assert categories_of_model(names, 3, "own.pth").names == ("bolt", "nut")
    with pytest.raises(UserError, match=r"names\.txt: names 2 categories, which is 3 classes .* own\.pth has 4"):
        categories_of_model(names, 4, "own.pth")
    sparse = tmp_path / "instances.json"
    sparse.write_text(ANNOTATIONS)
    assert categories_of_model(sparse, 10, "own.pth").labels == (3, 7, 9)
    for text, message in (("{}", "not a COCO annotation file"), ('{"categories": []}', "names no category")):
        sparse.write_text(text)
        with pytest.raises(UserError, match=message):
            read_categories(sparse)
    with pytest.raises(UserError, match="resnet50: --categories"):
        open_model("resnet50", categories=names)


def test_whole_pickles_and_other_models_are_named(tmp_path: Path) -> None:
    torch.save(resnet18(weights=None), tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"whole\.pth: .*pickle of torchvision\.models\.resnet\.ResNet.*state_dict"):
        read_tensors(tmp_path / "whole.pth")
    tensor = torch.zeros(1)
    for names, message in (
        (["roi_heads.box_predictor.cls_score.weight", "backbone.fpn.inner_blocks.0.1.weight"], "_v2 detector"),
        (["head.classification_head.cls_logits.weight"], "one-stage"),
        (["backbone.bottom_up.stem.conv1.weight"], "import_detectron2"),
        (["roi_heads.box_predictor.cls_score.weight", "backbone.0.0.weight"], "another backbone"),
    ):
        with pytest.raises(UserError, match=message):
            identify(dict.fromkeys(names, tensor), "own.pth")
    assert list(current_names({"_orig_mod.module.fc.bias": tensor})) == ["fc.bias"]


def test_a_pth_is_evaluated_trained_and_exported_with_the_datas_categories(tiny_coco: Path, tmp_path: Path) -> None:
    """One file through the tools: its heads are kept where it has as many classes as the data."""
    settings = DetectorSettings(
        num_classes=1 + len(CATEGORIES),
        backbone=BackboneSettings("resnet18", fpn_channels=16),
        roi=RoiSettings(box_features=16),
    )
    model = settings.build("box")
    path = tmp_path / "own.pt"
    torch.save(model.state_dict(), path)
    names = tuple(category["name"] for category in CATEGORIES)
    with pytest.warns(UserWarning, match="6 classes are taken as the data's, in their order: "):
        found = evaluate_file(path, tiny_coco, "box", limit=1, progress=False)
    assert found.predictor.categories.names == names

    data = Categories.from_coco(CATEGORIES)
    start = initial_detector("box", data, DetectorSettings(), init=path)
    assert "all weights (its 6 classes are taken as the data's" in start.origin
    assert torch.equal(
        start.model.get_submodule("roi_heads.box_predictor.cls_score").weight,
        model.get_submodule("roi_heads.box_predictor.cls_score").weight,
    )
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"thing {number}" for number in range(6)))
    assert training_categories("box", data, path, other) == data
    kept = initial_detector("box", data, DetectorSettings(), init=path, named=other)
    assert "the heads are random (the file's detect something else: thing 0" in kept.origin

    _, task, categories = open_detector(str(path), categories=other)
    assert (task, categories.names[5]) == ("box", "thing 5")
    assert load_predictor(path, categories=other).categories == categories
    with pytest.raises(UserError, match="--categories: goes with"):
        training_categories("box", data, None, other)


@pytest.mark.parametrize("command", ["predict", "serve", "demo_video"])
def test_a_pth_can_be_told_its_categories_wherever_it_detects(command, tmp_path, monkeypatch, capsys):
    seen = {}

    def load(file: Path, **options: object) -> None:
        seen[file.name] = options["categories"]
        if file.suffix == ".pth":
            raise UserError("stop")

    monkeypatch.setattr(f"norton_deploy.commands.{command}.load_predictor", load)
    images = tmp_path / "a.png"
    images.write_bytes(b"")
    given = {
        "predict": ["--images", str(images), "--out", str(tmp_path / "o")],
        "serve": ["--baseline", "dense.onnx"],
        "demo_video": ["--baseline", "dense.onnx", "--source", "synthetic", "--out", str(tmp_path / "o.mp4")],
    }
    arguments = ["--model", "own.pth", "--categories", "names.txt", *given[command]]
    assert run(command, arguments) == 1 and capsys.readouterr().err.endswith("error: stop\n")
    assert seen.pop("own.pth") == Path("names.txt") and not any(seen.values())

"""One-file checkpoints: whole, rebuilt from nothing else, and suspicious of everything else."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torchvision.models import resnet18
from torchvision.models.detection import maskrcnn_resnet50_fpn

from norton_deploy.checkpoints.checkpoint import (
    CheckpointHeader,
    class_categories,
    load_checkpoint,
    read_header,
    save_checkpoint,
)
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.checkpoints.torchvision_weights import read_tensors
from norton_deploy.compression.compress import build_classifier, build_detector
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import (
    BackboneSettings,
    ImageSettings,
    RoiSettings,
)
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Categories

PLAN = CompressionPlan("resnet18", {"layer1.0.conv1": 1}, {"layer1.0.conv1": 40, "layer3": 200})
SETTINGS = DetectorSettings(
    num_classes=3,
    backbone=BackboneSettings("resnet18", fpn_channels=16),
    roi=RoiSettings(box_features=32),
    image=ImageSettings(64, 64),
)
HEADER = CheckpointHeader("mask", SETTINGS, PLAN, Categories((1, 2), (1, 37), ("person", "sports ball")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(path, build_detector("mask", SETTINGS, PLAN), HEADER.made_by("test"))
    return path


def test_round_trip(saved: Path) -> None:
    state = torch.random.get_rng_state()
    loaded = load_checkpoint(saved)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (loaded.header.task, loaded.header.settings, loaded.header.plan) == ("mask", SETTINGS, PLAN)
    assert loaded.header.categories.name_of_label[2] == "sports ball"
    assert loaded.header.lineage[-1]["command"] == "test"
    assert not loaded.model.training
    stored = safetensors.torch.load_file(saved)
    assert stored.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_half_precision_loads_as_float32(saved: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(saved)
    save_checkpoint(tmp_path / "half.safetensors", loaded.model, loaded.header, half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * saved.stat().st_size
    again = load_checkpoint(tmp_path / "half.safetensors").model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-3, rtol=1e-3)


def test_classifier_round_trip(tmp_path: Path) -> None:
    settings = ClassifierSettings("resnet18", 2, image_size=(48, 48))
    header = CheckpointHeader("cls", settings, None, class_categories(["cat", "dog"]))
    save_checkpoint(tmp_path / "c.safetensors", build_classifier(settings), header)
    assert read_header(tmp_path / "c.safetensors") == header


def test_truncated(saved: Path, tmp_path: Path) -> None:
    for size in (0, 5, 1000, saved.stat().st_size - 1):
        short = tmp_path / f"{size}.safetensors"
        short.write_bytes(saved.read_bytes()[:size])
        with pytest.raises(UserError, match="truncated or not a safetensors file"):
            load_checkpoint(short)


def test_tampered_weights_and_header(saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(content)
    renamed = saved.read_bytes().replace(b"sports ball", b"sports bell")
    (tmp_path / "header.safetensors").write_bytes(renamed)
    for name in ("weights", "header"):
        with pytest.raises(UserError, match="do not match their recorded digest"):
            load_checkpoint(tmp_path / f"{name}.safetensors")


def test_another_format_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="new: checkpoint format 3, this version reads 2; use the norton_deploy"):
        CheckpointHeader.from_dict({**read_header(saved).to_dict(), "format": 3}, "new")


def test_settings_of_the_other_kind(saved: Path) -> None:
    header = read_header(saved)
    assert header.detector == SETTINGS
    with pytest.raises(UserError, match="expected a classifier, found a mask detector"):
        _ = header.classifier
    classifier = replace(header, task="cls", settings=ClassifierSettings("resnet18"))
    assert classifier.classifier.architecture == "resnet18"
    with pytest.raises(UserError, match="expected a detector, found the classifier resnet18"):
        _ = classifier.detector


def test_foreign_files(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a checkpoint of norton_deploy"):
        load_checkpoint(tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path / "nothing.safetensors")


def test_weights_of_another_model_name_the_tensor(saved: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(saved)
    wider = replace(loaded.header, settings=replace(SETTINGS, roi=replace(SETTINGS.roi, box_features=48)))
    save_checkpoint(tmp_path / "w.safetensors", loaded.model, wider)
    with pytest.raises(UserError, match=r"roi_heads\.box_head\.fc6\.bias.*has shape \(32,\), expected \(48,\)"):
        load_checkpoint(tmp_path / "w.safetensors")


def test_a_failed_write_leaves_the_old_file(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")

    class Broken(torch.nn.Module):
        def state_dict(self, *args: object, **kwargs: object) -> dict:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        save_checkpoint(target, Broken(), HEADER)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


class _Malicious:
    def __reduce__(self) -> tuple:
        return (Path("/nonexistent-but-run").touch, ())


def test_pth_files_run_no_code(tmp_path: Path) -> None:
    torch.save({"weight": _Malicious()}, tmp_path / "bad.pth")
    (tmp_path / "worse.pth").write_bytes(b"\x80\x02cos\nsystem\n(S'id'\ntR.")
    for name in ("bad.pth", "worse.pth"):
        with pytest.raises(UserError, match=rf"{name}: not a file of plain tensors") as refused:
            read_tensors(tmp_path / name)
        assert "weights_only" not in str(refused.value)  # torch advises to run it


def test_torchvision_classifier_file(tmp_path: Path) -> None:
    model = resnet18(weights=None, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "r18.pth")
    opened = open_model(str(tmp_path / "r18.pth"))
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(opened.model(images), model(images))
    assert open_model("resnet18", str(tmp_path / "r18.pth")).header == opened.header
    with pytest.raises(UserError, match="holds resnet18, not resnet50"):
        open_model("resnet50", str(tmp_path / "r18.pth"))


def test_torchvision_detector_file_with_its_first_layer_names(tmp_path: Path) -> None:
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).eval()
    old = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for level in range(4):
            name = name.replace(f"blocks.{level}.0.", f"blocks.{level}.")
            name = name.replace(f"mask_head.{level}.0.", f"mask_head.mask_fcn{level + 1}.")
        old[name] = tensor
    torch.save(old, tmp_path / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth")
    opened = open_model(str(tmp_path / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"))
    assert opened.header.task == "mask"
    assert opened.header.detector.backbone.norm_eps == 0
    assert opened.header.categories.name_of_label[90] == "toothbrush"
    expected = model.state_dict()
    for name, tensor in opened.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="resnet51"):
        open_model("resnet51")
    with pytest.raises(UserError, match="only goes with an architecture's name"):
        open_model("some.safetensors", "imagenet")

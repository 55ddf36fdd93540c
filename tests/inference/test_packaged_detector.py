import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import package_weights
from norton_deploy.checkpoints.checkpoint import CheckpointHeader, load_checkpoint, read_header, save_checkpoint
from norton_deploy.commands import make_synthetic
from norton_deploy.commands.demo_video import Settings, chosen_model
from norton_deploy.compression.compress import compress
from norton_deploy.data.synthetic import CATEGORIES
from norton_deploy.errors import UserError
from norton_deploy.inference import loading as weights
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Categories


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installation without weights."""
    monkeypatch.setattr(weights, "PACKAGED_FOLDER", tmp_path)
    return tmp_path


def test_the_packaged_detector_is_the_default_for_drawn_scenes(folder, tmp_path):
    settings = Settings(out=tmp_path / "out.mp4", task="keypoint")
    with pytest.raises(UserError, match=r"fast_keypoint\.safetensors: .*--model FILE"):
        chosen_model(settings)
    (folder / "fast_keypoint.safetensors").write_bytes(b"")
    assert chosen_model(settings) == folder / "fast_keypoint.safetensors"
    given = Settings(out=tmp_path / "out.mp4", model=tmp_path / "own.onnx", source="0")
    assert chosen_model(given) == tmp_path / "own.onnx"
    with pytest.raises(UserError, match="--model: needed for --source 0"):
        chosen_model(Settings(out=tmp_path / "out.mp4", source="0"))


def test_a_checkpoint_is_packaged_in_float16(folder, monkeypatch):
    names = [category["name"] for category in CATEGORIES]
    shape = DetectorSettings(
        num_classes=len(names) + 1,
        backbone=BackboneSettings("resnet18", norm="batch", fpn_channels=16),
        roi=RoiSettings(box_features=32, mask_channels=(16,)),
        image=ImageSettings(64, 64),
    )
    plan = CompressionPlan("rcnn", {}, {f"backbone.body.layer{stage}": 16 for stage in (3, 4)})
    torch.manual_seed(0)
    dense = shape.build("mask")
    ids = tuple(category["id"] for category in CATEGORIES)
    categories = Categories(tuple(range(1, len(ids) + 1)), ids, tuple(names))
    header = CheckpointHeader("mask", shape, None, categories)
    save_checkpoint(folder / "dense.safetensors", dense, header)
    save_checkpoint(folder / "small.safetensors", compress(dense, plan), header.made_by("test", plan=plan))
    make_synthetic.main(["--out", str(folder / "data"), "--train", "1", "--val", "2", "--workers", "1"])
    monkeypatch.setattr(sys, "argv", ["benchmarks/package_weights.py"])
    settings = package_weights.Settings(folder / "small.safetensors", folder / "data", folder / "packaged.json")
    with pytest.raises(UserError, match="expected a compressed mask or keypoint detector"):
        package_weights.main(replace(settings, model=folder / "dense.safetensors"))
    monkeypatch.setattr(package_weights, "LARGEST_MB", 1.0)
    with pytest.raises(UserError, match=r"in float16, at most 1 MB"):
        package_weights.main(settings)
    monkeypatch.setattr(package_weights, "LARGEST_MB", 30.0)
    package_weights.main(settings)
    packed = load_checkpoint(weights.packaged_detector("mask"))
    expected = load_checkpoint(folder / "small.safetensors").model.state_dict()
    for name, tensor in packed.model.state_dict().items():
        wanted = expected[name].half().float() if tensor.is_floating_point() else expected[name]
        assert torch.equal(tensor, wanted), name
    assert read_header(weights.packaged_path("mask")).lineage[-1]["command"].startswith("benchmarks/package_weights.py")
    entry = json.loads((folder / "packaged.json").read_text())["cells"]["mask"]
    assert entry["bytes"] == weights.packaged_path("mask").stat().st_size
    assert entry["float32"]["images"] == entry["float16"]["images"] == 2
    assert "| mask | fast_mask.safetensors |" in (folder / "packaged.md").read_text()

"""The two export commands, on a small checkpoint."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from norton_deploy import commands
from norton_deploy.checkpoints.checkpoint import CheckpointHeader, save_checkpoint
from norton_deploy.compression.calibration import LOGIT_SPREAD, calibrate_random_detector
from norton_deploy.data.synthetic import CATEGORIES, draw_scene
from norton_deploy.errors import UserError
from norton_deploy.export.tensorrt_build import EngineManifest
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.parity import export_checked
from norton_deploy.parity.export_checked import ExportOptions
from norton_deploy.structures import Categories

SETTINGS = DetectorSettings(
    num_classes=7,
    backbone=BackboneSettings("resnet18", fpn_channels=16),
    roi=RoiSettings(box_features=32, canonical_scale=64, detections_per_image=10),
    rpn=RpnSettings(anchor_sizes=(16, 32, 48, 64, 96), pre_nms=(100, 60), post_nms=(100, 50)),
    image=ImageSettings(96, 128),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random box detector that finds something."""
    torch.manual_seed(0)
    model = SETTINGS.build("box").eval()
    images = [torch.from_numpy(draw_scene(seed, (96, 128)).image).permute(2, 0, 1) / 255 for seed in (1, 2)]
    calibrate_random_detector(model, images, SETTINGS)
    path = tmp_path_factory.mktemp("checkpoint") / "box.safetensors"
    save_checkpoint(path, model, CheckpointHeader("box", SETTINGS, None, Categories.from_coco(CATEGORIES)))
    return path


def test_random_weights_spread_their_scores(checkpoint: Path) -> None:
    from norton_deploy.checkpoints.checkpoint import load_checkpoint

    model = load_checkpoint(checkpoint).model
    scene = torch.from_numpy(draw_scene(1, (96, 128)).image).permute(2, 0, 1) / 255
    logits: list[torch.Tensor] = []
    predictor = model.roi_heads.box_predictor.cls_score  # type: ignore[union-attr]
    assert isinstance(predictor, nn.Linear)
    predictor.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    with torch.no_grad():
        assert len(model([scene])[0]["boxes"]) == 10
    assert LOGIT_SPREAD / 2 < float(logits[0].std()) < LOGIT_SPREAD * 2


@pytest.mark.slow
def test_export_onnx_with_evaluation(checkpoint: Path, tmp_path: Path, tiny_coco: Path) -> None:
    out, report_file = tmp_path / "box.onnx", tmp_path / "report.json"
    arguments = ["--model", str(checkpoint), "--image-size", "128", "128", "--parity-images", "2"]
    arguments += ["--images", str(tiny_coco / "val2017"), "--eval", str(tiny_coco), "--eval-limit", "2"]
    assert commands.run("export_onnx", [*arguments, "--out", str(out), "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["parity"]["passed"] and report["parity"]["detections"] == 20
    assert {moment: set(values) for moment, values in report["average_precision"].items()} == {
        "before": {"bbox"},
        "after": {"bbox"},
    }
    assert report["contract"]["categories"]["names"][0] == "person"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box.onnx", "box.reference.npz", "report.json"]


def test_the_graph_has_the_models_own_size_and_a_far_one_is_remarked_upon(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def begin(_model: nn.Module, _options: ExportOptions, image_size: tuple[int, int]) -> None:
        sizes.append(image_size)
        raise UserError("the export begins here")

    monkeypatch.setattr(export_checked, "static_detector", begin)
    arguments = ["--model", str(checkpoint), "--out", str(tmp_path / "own.onnx")]
    assert commands.run("export_onnx", arguments) == 1
    assert "is far from" not in capsys.readouterr().err
    assert commands.run("export_onnx", [*arguments, "--image-size", "256", "256"]) == 1
    assert "--image-size 256 256 is far from the 96 pixels" in capsys.readouterr().err
    assert sizes == [(96, 96), (256, 256)]


def test_outputs_and_images_are_checked_before_the_export(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in [
        (["--out", str(tmp_path / "e")], "ends in .onnx"),
        (["--out", str(tmp_path / "e.onnx"), "--json", str(tmp_path)], "is a folder"),
        (["--out", str(tmp_path / "e.onnx"), "--images", str(tmp_path / "absent")], "no images"),
        (["--out", str(tmp_path / "e.onnx"), "--eval", str(tmp_path / "absent")], "absent"),
    ]:
        assert commands.run("export_onnx", ["--model", str(checkpoint), *more]) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_trt_without_tensorrt_then_the_tool_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "box.engine"
    arguments = [
        "--model",
        str(checkpoint),
        "--image-size",
        "96",
        "128",
        "--nms-iterations",
        "8",
        "--engine",
        "tensorrt",
    ]
    assert commands.run("export_trt", [*arguments, "--parity-images", "1", "--out", str(engine)]) == 3
    printed = capsys.readouterr().err
    assert "not built, tensorrt: " in printed and "trtexec --onnx=" in printed
    graph = tmp_path / "box.onnx"
    assert graph.is_file() and not engine.exists()
    if find_spec("tensorrt_rtx"):
        again = ["--onnx", str(graph), "--engine", "tensorrt-rtx", "--compute-capability", "89", "--out", str(engine)]
        assert commands.run("export_trt", again) == 0
        assert EngineManifest.load(engine).compute_capability == "89"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "96", "96"], "--task: needed"),
        (["--model", "absent.safetensors"], "no such file"),
        (["--model", "absent.safetensors", "--plan", "p.yaml"], "--plan: only without --model"),
        (["--task", "box", "--parity-images", "0"], "--parity-images: expected at least 1"),
    ],
)
def test_mistakes_exit_1_with_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run("export_onnx", [*arguments, "--out", str(tmp_path / "a.onnx")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_wrong_task_and_wrong_suffix(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(checkpoint), "--task", "mask", "--out", str(tmp_path / "a.onnx")]
    assert commands.run("export_onnx", arguments) == 1
    assert "task 'box', --task is 'mask'" in capsys.readouterr().err
    assert commands.run("export_trt", ["--model", str(checkpoint), "--out", str(tmp_path / "a.plan")]) == 1
    assert ".engine" in capsys.readouterr().err

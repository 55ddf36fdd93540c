import contextlib
import io
import json

import pytest
import torch
from pycocotools.cocoeval import COCOeval

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, save_checkpoint
from norton_deploy.commands.eval_det import main
from norton_deploy.data.coco import CocoDetection
from norton_deploy.errors import UserError
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings


@pytest.fixture(scope="module")
def mask_detector(tiny_coco, tmp_path_factory):
    """A random Mask R-CNN: its detections are bad, but there are many of them."""
    path = tmp_path_factory.mktemp("model") / "mask.safetensors"
    categories = CocoDetection(tiny_coco, "val", "mask").categories
    settings = DetectorSettings(
        num_classes=categories.num_classes,
        backbone=BackboneSettings("resnet18", norm="batch", fpn_channels=16),
        roi=RoiSettings(box_features=32, mask_channels=(16,)),
        image=ImageSettings(96, 128),
        rpn=RpnSettings(anchor_sizes=(8, 16, 32, 48, 64)),
    )
    torch.manual_seed(0)
    model = settings.build("mask")
    save_checkpoint(path, model, CheckpointHeader("mask", settings, None, categories))
    return path


def test_figures_table_and_results_files_agree(tiny_coco, tmp_path, mask_detector, capsys):
    results, figures_file = tmp_path / "found.json", tmp_path / "figures.json"
    arguments = ["--task", "mask", "--data", str(tiny_coco), "--model", str(mask_detector), "--workers", "0"]
    arguments += ["--results", str(results), "--json", str(figures_file), "--no-progress", "--device", "cpu"]
    assert main(arguments) == 0
    figures = json.loads(figures_file.read_text())
    assert figures["results"] == {"bbox": str(tmp_path / "found.bbox.json"), "segm": str(results)}
    assert (figures["task"], figures["backend"], figures["images"]) == ("mask", "torch", 4)
    segm = figures["metrics"]["segm"]
    assert figures["table3"] == {"AP": segm["AP"], "AR": segm["AR100"]}
    for iou_type, path in figures["results"].items():
        truth = CocoDetection(tiny_coco, "val", "mask").coco
        with contextlib.redirect_stdout(io.StringIO()):
            direct = COCOeval(truth, truth.loadRes(path), iou_type)
            direct.evaluate()
            direct.accumulate()
            direct.summarize()
        assert list(figures["metrics"][iou_type].values()) == direct.stats.tolist()
    assert len(json.loads(results.read_text())) > 20
    printed = capsys.readouterr().out
    assert f"| segm | AP | {segm['AP']:.4f} | AP in Table III |" in printed


def test_another_task_is_named(tiny_coco, mask_detector):
    arguments = ["--task", "box", "--data", str(tiny_coco), "--model", str(mask_detector), "--device", "cpu"]
    with pytest.raises(UserError, match="a detector for task 'mask', --task is 'box'"):
        main(arguments)


def test_impossible_numbers_and_outputs_are_named(tiny_coco, tmp_path, mask_detector):
    arguments = ["--task", "mask", "--data", str(tiny_coco), "--model", str(mask_detector), "--device", "cpu"]
    for more, message in [
        (["--limit", "-1"], "--limit: expected at least 1, got -1"),
        (["--workers", "-1"], "--workers: expected at least 0"),
        (["--json", str(tmp_path)], "--json .*: is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            main([*arguments, *more])

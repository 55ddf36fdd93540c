"""eval_det and predict: two processes find what one finds, and a stopped run what one finds that never was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, save_checkpoint
from norton_deploy.commands import run
from norton_deploy.data.coco import CocoDetection
from norton_deploy.errors import UserError
from norton_deploy.inference.image_journal import ImageJournal
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Detections

BOTH = "import sys; from norton_deploy.commands import run; n = sys.argv.index('+')\n"
BOTH += "sys.exit(run('eval_det', sys.argv[1:n]) or run('predict', sys.argv[n + 1:]))"


@pytest.fixture(scope="module")
def detector(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mask R-CNN: its detections are bad, but there are many of them."""
    path = tmp_path_factory.mktemp("model") / "mask.safetensors"
    categories = CocoDetection(tiny_coco, "val", "mask").categories
    settings = DetectorSettings(
        num_classes=categories.num_classes, backbone=BackboneSettings("resnet18", norm="batch", fpn_channels=16),
        roi=RoiSettings(box_features=32, mask_channels=(16,), detections_per_image=20), image=ImageSettings(96, 128),
        rpn=RpnSettings(anchor_sizes=(8, 16, 32, 48, 64), pre_nms=(100, 50), post_nms=(100, 50)),
    )  # fmt: skip
    torch.manual_seed(0)
    save_checkpoint(path, settings.build("mask"), CheckpointHeader("mask", settings, None, categories))
    return path


def arguments(data: Path, model: Path, out: Path) -> tuple[list[str], list[str]]:
    """Of eval_det and of predict."""
    evaluate = ["--task", "mask", "--data", str(data), "--model", str(model), "--workers", "0", "--device", "cpu",
                "--results", str(out / "found.json"), "--json", str(out / "figures.json"), "--no-progress"]  # fmt: skip
    predict = ["--model", str(model), "--images", str(data / "val2017"), "--out", str(out / "seen"), "--device", "cpu"]
    return evaluate, predict


def outcome(out: Path) -> list[Any]:
    assert not list(out.rglob("*.parts"))
    figures = json.loads((out / "figures.json").read_text())["metrics"]
    pictures = [path.read_bytes() for path in sorted((out / "seen").glob("*.jpg"))]
    files = [json.loads((out / name).read_text()) for name in ("found.json", "found.bbox.json", "seen/detections.json")]
    assert len(files[0]) > 20 and len(files[2]["annotations"]) > 20 and len(pictures) == 4
    return [figures, pictures, *files]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_and_a_stopped_run(
    tiny_coco: Path, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, predict = arguments(tiny_coco, detector, tmp_path / "one")
    assert run("eval_det", evaluate) == 0 and run("predict", predict) == 0
    expected = outcome(tmp_path / "one")

    script = tmp_path / "both.py"
    script.write_text(BOTH)
    evaluate, predict = arguments(tiny_coco, detector, tmp_path / "two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *evaluate, "+", *predict], env=environment, check=True)
    assert outcome(tmp_path / "two") == expected

    original, calls = Detections.to_coco_results, list[int]()

    def stop_at_the_third(self: Detections, image_id: int, categories: Any) -> list[dict[str, Any]]:
        calls.append(image_id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, image_id, categories)

    monkeypatch.setattr(Detections, "to_coco_results", stop_at_the_third)
    evaluate, predict = arguments(tiny_coco, detector, tmp_path / "stopped")
    for name, words in (("eval_det", evaluate), ("predict", predict)):
        calls.clear()
        assert run(name, words) == 130
        with open(next((tmp_path / "stopped").rglob("*.jsonl")), "a") as stream:
            stream.write('{"id": 3, "fou')  # as a kill leaves it
        assert run(name, words) == 1  # without --resume
        assert run(name, [*words, "--resume"]) == 0
        assert len(calls) == 3 + 2  # the first two images are not repeated
    assert outcome(tmp_path / "stopped") == expected


def test_what_a_stopped_run_left_is_of_that_run_only(tmp_path: Path) -> None:
    folder = tmp_path / "found.parts"
    ImageJournal(folder, {"model": "a"}, resume=False).add(7, [1.5])
    assert ImageJournal(folder, {"model": "a"}, resume=True).done == {7: [1.5]}
    with pytest.raises(UserError, match="--resume goes on, --overwrite begins anew"):
        ImageJournal(folder, {"model": "a"}, resume=False)
    ImageJournal(folder, {"model": "a"}, resume=True, overwrite=True)
    assert ImageJournal(folder, {"model": "a"}, resume=True, overwrite=True).done == {7: [1.5]}
    with pytest.raises(UserError, match="of another model, other data or settings"):
        ImageJournal(folder, {"model": "b"}, resume=True)
    assert ImageJournal(folder, {"model": "b"}, resume=True, overwrite=True).done == {}
    assert ImageJournal(folder, {"model": "b"}, resume=False, overwrite=True).done == {}

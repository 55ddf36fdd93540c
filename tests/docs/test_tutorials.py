"""The commands of the tutorials, as they stand, on tiny data: each ```sh block, in order, in a folder of its own."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, class_categories, save_checkpoint
from norton_deploy.commands import run
from norton_deploy.compression.calibration import calibrate_random_detector
from norton_deploy.data.synthetic import CATEGORIES, draw_scene
from norton_deploy.detectron2.config import read_config
from norton_deploy.detectron2.weights import detectron2_name
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Categories

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
SETTINGS = DetectorSettings(
    num_classes=7,
    backbone=BackboneSettings("resnet18", fpn_channels=16),
    roi=RoiSettings(box_features=32, mask_channels=(16,), canonical_scale=64, detections_per_image=10),
    rpn=RpnSettings(anchor_sizes=(16, 32, 48, 64, 96), pre_nms=(100, 60), post_nms=(100, 50)),
    image=ImageSettings(96, 128),
)
ENGINE_NOT_BUILT = 3
# What makes a command cheap: the rest of its line is the tutorial's.
TINY = {
    "train_det": "--epochs None --steps 1 --batch-size 1 --workers 0 --evaluation-images 1 --precision no --device cpu",
    "train_cls": "--epochs None --steps 1 --batch-size 2 --workers 0 --precision no --device cpu --image-size 32 32",
    "eval_det": "--limit 1 --workers 0 --device cpu",
    "compress": "--starts 1",
    "export_onnx": "--parity-images 1",
    "export_trt": "--parity-images 1 --nms-iterations 4",
    "predict": "--device cpu",
}
SMALL_DETECTOR = (  # random weights need a normalisation that lives
    "--detector.image.min-size 96 --detector.image.max-size 128 --detector.backbone.norm batch "
    "--detector.backbone.fpn-channels 32 --detector.roi.box-features 32 --detector.roi.mask-channels 16 "
    "--detector.rpn.pre-nms 100 60 --detector.rpn.post-nms 100 50 --detector.roi.detections-per-image 20"
)


pytestmark = pytest.mark.usefixtures("narrow_resnets")


def commands_of(tutorial: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (TUTORIALS / f"{tutorial}.md").read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def follow(tutorial: str, *, expected: dict[str, tuple[int, ...]] | None = None, **extra: str) -> None:
    """Run the tutorial's commands in the current folder; `extra` has further arguments by command."""
    for program, *arguments in commands_of(tutorial):
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
            continue
        name = Path(program).stem
        more = TINY.get(name, "") if "--onnx" not in arguments else ""
        status = run(name, [*arguments, *shlex.split(f"{more} {extra.get(name, '')}")])
        assert status in (expected or {}).get(name, (0,)), (name, arguments)


@pytest.fixture
def folder(tmp_path: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tools/, configs/ and data/, and a small plan in place of fast.yaml, which is for a ResNet-50."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "data").symlink_to(tiny_coco)
    (tmp_path / "coco").symlink_to(tiny_coco)
    Image.fromarray(draw_scene(5, (96, 128)).image).save(tmp_path / "picture.jpg")
    plan = CompressionPlan("rcnn", {"backbone.body.layer1.1.conv2": 1}, {"backbone.body.layer1.1.conv1": 8})
    plan.save(tmp_path / "configs" / "plans" / "fast.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_detector(path: Path) -> None:
    torch.manual_seed(0)
    model = SETTINGS.build("mask").eval()
    images = [torch.from_numpy(draw_scene(seed, (96, 128)).image).permute(2, 0, 1) / 255 for seed in (1, 2)]
    calibrate_random_detector(model, images, SETTINGS)
    save_checkpoint(path, model, CheckpointHeader("mask", SETTINGS, None, Categories.from_coco(CATEGORIES)))


def test_every_tutorial_is_run() -> None:
    run_here = {"own_data", "detectron2", "jetson_rtx", "reproduce"}
    assert {path.stem for path in TUTORIALS.glob("*.md")} == run_here
    assert all(commands_of(tutorial) for tutorial in run_here)


@pytest.mark.slow
def test_own_data(folder: Path) -> None:
    follow(
        "own_data",
        train_det=f"{SMALL_DETECTOR} --detector.backbone.architecture resnet18",
    )
    assert (folder / "small_detector" / "labels.txt").is_file() and (folder / "seen" / "detections.json").is_file()


@pytest.mark.slow
def test_detectron2(folder: Path) -> None:
    structure = {"_BASE_": str(ROOT / "tests" / "detectron2" / "configs" / "mask.yaml")}
    classes = {"MODEL": {"ROI_HEADS": {"NUM_CLASSES": len(CATEGORIES)}}}
    (folder / "mask_rcnn.yaml").write_text(yaml.safe_dump(structure | classes))
    model = read_config(folder / "mask_rcnn.yaml").settings().build("mask")
    state = {detectron2_name(name): tensor for name, tensor in model.state_dict().items()}
    for end, rows in (("bbox_pred", 4), ("mask_head.predictor", 1)):  # Detectron2 has none for the background
        state |= {name: tensor[rows:] for name, tensor in state.items() if f"{end}." in name and "roi_heads" in name}
    torch.save({"model": state}, folder / "model_final.pth")
    follow("detectron2")
    assert (folder / "runs" / "small" / "last.safetensors").is_file()


@pytest.mark.slow
def test_jetson_rtx(folder: Path) -> None:
    if not find_spec("tensorrt_rtx"):
        pytest.skip("needs tensorrt-rtx")
    save_detector(folder / "small.safetensors")
    follow("jetson_rtx", expected={"export_trt": (0, ENGINE_NOT_BUILT)})
    assert (folder / "small_fp16.onnx").is_file() and (folder / "small_rtx" / "model.engine").is_file()


@pytest.mark.slow
def test_reproduce(folder: Path) -> None:
    settings = ClassifierSettings("resnet50", 6, image_size=(32, 32))
    header = CheckpointHeader("cls", settings, None, class_categories([str(index) for index in range(6)]))
    save_checkpoint(folder / "dense.safetensors", settings.build().eval(), header)
    for split in ("train", "val"):
        for index in range(2):
            target = folder / "imagenet" / split / str(index)
            target.mkdir(parents=True)
            pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(target / "a.png")
    CompressionPlan("resnet50", {"layer1.2.conv2": 1}, {}).save(folder / "configs" / "plans" / "table3.yaml")
    follow("reproduce", compress="--weights none", train_det=SMALL_DETECTOR)
    assert (folder / "mask.json").is_file()

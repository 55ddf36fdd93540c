"""The gate refuses every deliberate alteration, on images with detections and on blank ones, and nothing else."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from altered_graphs import COMMON, KEYPOINT, MASK, Alteration, save_signed
from conftest import CATEGORIES
from reduced_detectors import IMAGE_SIZE, blobs, reduced_detector
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.compression.lowering import lower_model
from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import export_onnx, read_contract
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.inference.loading import load_predictor
from norton_deploy.parity.gate import check_parity
from norton_deploy.parity.report import ENOUGH, ParityReport
from norton_deploy.structures import TASKS, Task

BLANK = [np.full((*IMAGE_SIZE, 3), 120, np.uint8)]
FOUND = list(blobs(2, seed=5).numpy())
ALTERATIONS: list[tuple[Task, str, Alteration]] = [
    *(("mask", name, change) for name, change in (COMMON | MASK).items()),
    *(("keypoint", name, change) for name, change in KEYPOINT.items()),
]
QUICK = (
    "boxes right edge + 0.2 px",
    "scores + 0.001",
    "one detection too few",
    "score threshold 0.06",
    "box NMS threshold 0.55",
    "RPN NMS threshold 0.6",
    "pixel mean + 1 level",
    "box deltas",
    "masks x 0.95",
    *(name for name in COMMON if "metadata" in name),
)
Judged = tuple[GeneralizedRCNN, Path]


@pytest.fixture(scope="session")
def silent(
    once: Callable[[str, Callable[[Path], None]], Path], of_one_worker: Callable[[str, FasterRCNN], FasterRCNN]
) -> Callable[[Task], Judged]:
    """task -> a detector that finds nothing in any image, and its graph."""

    def make(task: Task) -> Judged:
        model = copy.deepcopy(reduced_detector(task))
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.bias[0] += 1000
        of_one_worker(f"silent_{task}", model)

        def export(path: Path) -> None:
            graph = StaticRCNN(lower_model(copy.deepcopy(model)), GraphSettings(IMAGE_SIZE, batch=2, target="tensorrt"))
            export_onnx(graph, path, categories=CATEGORIES, weights_sha256=tensors_digest(model.state_dict()))

        return model, once(f"silent_{task}.onnx", export)

    return make


def judge(judged: Judged, images: list[np.ndarray]) -> ParityReport:
    report = check_parity(*judged, images, categories=CATEGORIES)
    report.require()
    return report


@pytest.mark.parametrize("task", ["mask", pytest.param("keypoint", marks=pytest.mark.slow)])
def test_a_sound_graph_passes_though_it_finds_nothing(task: Task, silent: Callable) -> None:
    report = judge(silent(task), BLANK)
    assert report.detections == 0 and min(report.compared.values()) >= ENOUGH


@pytest.mark.slow
@pytest.mark.parametrize("images", [BLANK, FOUND], ids=["blank", "found"])
@pytest.mark.parametrize("task", TASKS)
def test_sound_graphs_pass(task: Task, images: list[np.ndarray], exported: Callable) -> None:
    judge(exported(task, "tensorrt"), images)


@pytest.mark.parametrize(
    ("task", "name", "change"),
    [
        pytest.param(*alteration, id=alteration[1], marks=[] if alteration[1] in QUICK else pytest.mark.slow)
        for alteration in ALTERATIONS
    ],
)
def test_altered_graphs_are_refused_though_they_find_nothing(
    task: Task, name: str, change: Alteration, silent: Callable, tmp_path: Path
) -> None:
    refuse(silent(task), change, BLANK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name", "change"), ALTERATIONS, ids=[name for _, name, _ in ALTERATIONS])
def test_altered_graphs_are_refused_on_what_they_find(
    task: Task, name: str, change: Alteration, exported: Callable, tmp_path: Path
) -> None:
    refuse(exported(task, "tensorrt"), change, FOUND, tmp_path)


def refuse(judged: Judged, change: Alteration, images: list[np.ndarray], folder: Path) -> None:
    altered = onnx.load(judged[1])
    change(altered)
    save_signed(altered, folder / "altered.onnx")
    with pytest.raises(UserError, match=r"differs from eager mode|its metadata say"):
        judge((judged[0], folder / "altered.onnx"), images)


def test_a_graph_that_was_changed_is_not_loaded(exported: Callable, tmp_path: Path) -> None:
    path = exported("mask", "tensorrt")[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.onnx").write_bytes(content)
    model = onnx.load(path)
    COMMON["scores x 0.9"](model)
    onnx.save(model, tmp_path / "altered.onnx")
    for name in ("changed.onnx", "altered.onnx"):
        with pytest.raises(UserError, match="SHA-256"):
            read_contract(tmp_path / name)
        with pytest.raises(UserError, match="SHA-256"):
            load_predictor(tmp_path / name, device="cpu")

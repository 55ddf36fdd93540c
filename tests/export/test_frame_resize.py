"""Resizing inside the graph: the same bytes, and the same detections, as behind the predictor's letterbox."""

import copy
import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from altered_graphs import save_signed
from conftest import CATEGORIES
from onnx import numpy_helper
from reduced_detectors import IMAGE_SIZE, blobs, reduced_detector
from torchvision.models.detection import FasterRCNN

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.compression.lowering import lower_model
from norton_deploy.errors import UserError
from norton_deploy.export import tensorrt_build
from norton_deploy.export.frame_resize import FrameResize
from norton_deploy.export.letterbox import Letterbox
from norton_deploy.export.onnx_export import export_onnx, read_contract
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN, Target
from norton_deploy.inference.loading import load_predictor
from norton_deploy.parity.gate import check_parity
from norton_deploy.structures import Task

FRAME_SIZE = (135, 240)


Export = Callable[..., Any]


@pytest.fixture(scope="session")
def of_frames(
    once: Callable[[str, Callable[[Path], None]], Path], of_one_worker: Callable[[str, FasterRCNN], FasterRCNN]
) -> Export:
    """(task, target) -> a graph that takes frames."""

    def make(task: Task, target: Target = "onnxruntime") -> Path:
        model = of_one_worker(f"{task}_False", reduced_detector(task))

        def write(path: Path) -> None:
            settings = GraphSettings(IMAGE_SIZE, target=target, nms_iterations=12, input_size=FRAME_SIZE)
            graph = StaticRCNN(lower_model(copy.deepcopy(model)), settings)
            export_onnx(graph, path, categories=CATEGORIES, weights_sha256=tensors_digest(model.state_dict()))

        return once(f"frames-{task}-{target}.onnx", write)

    return make


@pytest.mark.parametrize(
    ("input_size", "image_size"),
    [
        ((720, 1280), (800, 800)),  # smaller
        ((100, 300), (160, 400)),  # larger
        ((64, 96), (32, 48)),  # halved: no padding
        ((37, 53), (64, 80)),
        ((120, 150), (120, 150)),  # nothing to do
        ((1, 5), (3, 7)),
    ],
)
def test_the_bytes_of_the_hosts_letterbox(input_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, *input_size, 3), np.uint8)
    expected = np.empty((2, *image_size, 3), np.uint8)
    for frame, canvas in zip(frames, expected, strict=True):
        Letterbox.fit(input_size, image_size).place(frame, canvas)
    found = FrameResize(input_size, image_size)(torch.from_numpy(frames)).numpy()
    difference = np.abs(found - expected)
    # OpenCV's code for x86-64 is repeated to the bit; that of other processors is within one level.
    assert difference.max() <= (0 if platform.machine() in ("x86_64", "AMD64") else 1)


@pytest.mark.parametrize(
    "task", ["mask", *(pytest.param(task, marks=pytest.mark.slow) for task in ("box", "keypoint"))]
)
def test_same_detections_as_behind_the_letterbox(task: Task, exported: Export, of_frames: Export) -> None:
    graphs = (exported(task, "onnxruntime")[1], of_frames(task))
    on_host, in_graph = (load_predictor(graph, device="cpu") for graph in graphs)
    assert (on_host.input_size, in_graph.input_size) == (IMAGE_SIZE, FRAME_SIZE)
    frames = list(blobs(3, FRAME_SIZE, seed=5).numpy())
    detections = 0
    for expected, found in zip(on_host(frames), in_graph(frames), strict=True):
        assert found.image_size == FRAME_SIZE
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        if task == "mask":
            assert expected.masks is not None and found.masks is not None
            assert np.mean(found.masks != expected.masks) < 1e-4
        if task == "keypoint":
            np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=1e-3)
        detections += len(found)
    assert detections > 20
    assert max(float(found.boxes[:, 2].max()) for found in in_graph(frames)) > IMAGE_SIZE[1]


def test_frames_of_another_size_are_refused(of_frames: Export) -> None:
    predictor = load_predictor(of_frames("box"), device="cpu")
    message = r"exactly 135x240 \(height x width\), got 120x150; export with --input-size 120 150"
    with pytest.raises(UserError, match=message):
        predictor([np.zeros((*IMAGE_SIZE, 3), np.uint8)])


def test_parity_covers_the_resizing(of_frames: Export, tmp_path: Path) -> None:
    path = of_frames("keypoint")
    contract = read_contract(path)
    assert (contract.input_size, contract.image_size, contract.resize) == (FRAME_SIZE, IMAGE_SIZE, "graph")
    images = list(blobs(2, FRAME_SIZE, seed=5).numpy())
    report = check_parity(reduced_detector("keypoint"), path, images)
    assert report.passed, report.table()
    assert report.detections > 10
    assert (report.stages[0].name, report.stages[0].worst <= 1) == ("resize", True)

    model = onnx.load(path)  # other rows of the frames than OpenCV reads
    gather = [node for node in model.graph.node if node.op_type == "Gather"][2]
    rows = next(entry for entry in model.graph.initializer if entry.name == gather.input[1])
    rows.CopyFrom(numpy_helper.from_array(np.maximum(numpy_helper.to_array(rows) - 3, 0), rows.name))
    save_signed(model, tmp_path / "shifted.onnx")
    with pytest.raises(UserError, match="first in stage 'resize'"):
        check_parity(reduced_detector("keypoint"), tmp_path / "shifted.onnx", images).require()


def test_boxes_in_the_wrong_pixels_are_noticed(of_frames: Export, tmp_path: Path) -> None:
    model = onnx.load(of_frames("box"))
    factors = next(entry for entry in model.graph.initializer if "to_frame" in entry.name)
    factors.CopyFrom(numpy_helper.from_array(np.ones(4, np.float32), factors.name))
    save_signed(model, tmp_path / "unscaled.onnx")
    with pytest.raises(UserError, match="first in stage 'given frame'"):
        check_parity(
            reduced_detector("box"), tmp_path / "unscaled.onnx", list(blobs(2, FRAME_SIZE, seed=5).numpy())
        ).require()


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_rtx_engine_that_takes_frames(of_frames: Export, tmp_path: Path) -> None:
    path = of_frames("mask", "tensorrt")
    manifest = tensorrt_build.build_engine(path, tmp_path / "frame.engine", compute_capability="86")
    assert manifest.contract.input_size == FRAME_SIZE


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"input_dtype": "float32"}, "resized as uint8"), ({"input_size": (0, 4)}, "at least 1 pixel")],
)
def test_impossible_frames(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings = GraphSettings(IMAGE_SIZE, **({"input_size": FRAME_SIZE} | changes))  # type: ignore[arg-type]
        StaticRCNN(lower_model(copy.deepcopy(reduced_detector("box"))), settings)

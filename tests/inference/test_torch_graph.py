"""A torch detector as modules of fixed shapes finds what it finds in eager mode; without a GPU nothing is recorded."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

from reduced_detectors import blobs, reduced_detector

from norton_deploy.errors import UserError
from norton_deploy.inference import torch_backend
from norton_deploy.inference.cuda_graph import capture
from norton_deploy.inference.loading import load_predictor, packaged_detector
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.structures import TASKS, Categories, Detections, Task

CATEGORIES = Categories((1, 2, 3, 4, 5), (1, 3, 5, 7, 9), ("a", "b", "c", "d", "e"))


def predictor(task: Task, **options: Any) -> TorchPredictor:
    return TorchPredictor(reduced_detector(task), task, CATEGORIES, device="cpu", **options)


def same(found: Detections, expected: Detections) -> None:
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-2)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    if expected.masks is not None:
        assert found.masks is not None and (found.masks != expected.masks).mean() < 1e-3
    if expected.keypoints is not None:
        assert found.keypoints is not None
        np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=0.05, rtol=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_the_second_frame_of_a_size_finds_what_eager_mode_finds(task: Task) -> None:
    frames = list(blobs(2, (90, 130)).numpy())  # resized by the model, within the recorded module
    fixed, eager = predictor(task, graphs=True), predictor(task, graphs=False)
    fixed([frames[1]])
    assert not fixed._graphs
    [found], [expected] = fixed([frames[0]]), eager([frames[0]])
    assert set(fixed._graphs) == {(1, 90, 130, 3)} and len(expected) > 3
    same(found, expected)
    fixed(frames), fixed(frames)
    assert set(fixed._graphs) == {(1, 90, 130, 3), (2, 90, 130, 3)}
    [_, second] = fixed(frames)
    same(second, eager([frames[1]])[0])


def test_sizes_that_were_not_used_for_longest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch_backend, "FrameDetector", lambda *_: None)
    monkeypatch.setattr(torch_backend, "FixedCall", lambda _module, shape, _device: made.append(shape) or shape)
    fixed = predictor("box", graphs=True)
    shapes = [(1, side, 9, 3) for side in range(5)]
    for shape in shapes[:4]:
        assert fixed._graph(shape) is None and fixed._graph(shape) == shape
    fixed._graph(shapes[0])
    assert fixed._graph(shapes[4]) is None and fixed._graph(shapes[4]) == shapes[4]
    assert made == shapes and list(fixed._graphs) == [shapes[2], shapes[3], shapes[0], shapes[4]]


def test_what_cannot_be_recorded_or_was_not_exact_is_left_to_eager_mode(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    frame = blobs(1, (90, 130)).numpy()[0]
    expected = predictor("box", graphs=False)([frame])[0]
    fixed = predictor("box", graphs=True)
    fixed([frame]), fixed([frame])
    [(shape, graph)] = fixed._graphs.items()
    outputs = graph(frame[None])
    for flag in ("nms_converged", "candidates_complete"):
        changed = outputs | {flag: np.array([False]), "boxes": outputs["boxes"] + 50}
        fixed._graphs[shape] = lambda _frames, changed=changed: changed
        same(fixed([frame])[0], expected)
    fixed._graphs[shape] = lambda _frames: outputs | {"finite": np.array([False])}
    with pytest.raises(UserError, match="are not finite"):
        fixed([frame])

    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch_backend, "FixedCall", refuse)
    eager = predictor("box", graphs=True)
    for _ in range(3):
        same(eager([frame])[0], expected)
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "no CUDA graph for 90x130 images (operation not permitted when stream is capturing)"
    ]


def test_a_stream_finds_what_calls_find(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = list(blobs(2, (90, 130)).numpy()), list(blobs(1, (64, 70)).numpy())
    frames = [large[0], large[1], small[0], large[0]]
    expected = predictor("box", graphs=False)(frames[:3])
    fixed = predictor("box", graphs=True)
    for index, found in enumerate(fixed.stream(iter(frames))):
        same(found, expected[index % 3])
        if index == 1:
            same(fixed([large[0]])[0], expected[0])  # a call in between disturbs nothing
    assert index == 3 and set(fixed._graphs) == {(1, 90, 130, 3)} and list(fixed.stream([])) == []
    [graph] = fixed._graphs.values()
    inexact = graph._launch() | {"nms_converged": torch.tensor([False])}
    monkeypatch.setattr(graph, "_launch", lambda: inexact)
    same(next(fixed.stream(large[1:])), expected[1])
    with pytest.raises(UserError, match="image 1: expected a uint8"):
        list(fixed.stream([large[1].astype(float)]))  # type: ignore[list-item]
    assert capture(lambda: 3, torch.device("cpu")) == (None, 3)


def test_fp16_is_a_gpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch computes in fp32, on a GPU also in fp16"):
        load_predictor(packaged_detector("mask"), device="cpu", float_type="fp16")
    with pytest.raises(UserError, match="cache: not an option of backend torch"):
        load_predictor(packaged_detector("mask"), device="cpu", cache=tmp_path)


def test_fp16_finds_nearly_the_same() -> None:
    frame = blobs(1, (120, 150)).numpy()[0]
    [found] = predictor("box", graphs=True, float_type="fp16")([frame])
    [expected] = predictor("box", graphs=False)([frame])
    assert len(found) > 3 and abs(len(found) - len(expected)) <= 3
    np.testing.assert_allclose(found.scores[:3], expected.scores[:3], atol=0.03)


def test_full_precision_leaves_cudnn_on() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    with torch_backend.full_precision(search=True):
        assert (cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32) == (True, True, False, False)
    assert (cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32) == before

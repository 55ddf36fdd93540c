"""Several threads and one predictor; numbers that are not finite."""

import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from reduced_detectors import blobs, reduced_detector

from norton_deploy.checkpoints.checkpoint import load_weights
from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.inference.loading import SizeBucketPredictor, load_predictor
from norton_deploy.inference.predictor import Predictor
from norton_deploy.inference.static_graph import StaticGraphPredictor
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.structures import Categories, Detections

SIZE, THREADS, CALLS = (32, 48), 4, 25


class EnginePredictor(StaticGraphPredictor):
    """As engines run: one buffer for the input and one for each output, the same for all calls."""

    backend = "tensorrt"

    def __init__(self, contract: GraphContract, graph: Predictor) -> None:
        super().__init__("fake.engine", contract, None)
        self._input = np.empty(contract.input_shape, contract.input_dtype)
        self._graph = graph
        self._outputs: dict[str, np.ndarray] = {}

    def run(self, batch):
        self._input[...] = batch
        threading.Event().wait(0.001)  # another thread may come in
        for name, value in self._graph.run(self._input).items():
            self._outputs.setdefault(name, value.copy())[...] = value
        return self._outputs


@pytest.fixture
def predictors(graph) -> dict[str, Callable[[], Predictor]]:
    """A predictor of every kind that finds bright rectangles, masks too."""
    one = load_predictor(graph(task="mask"))
    tall = load_predictor(graph("tall.onnx", task="mask", image_size=(48, 32)))
    return {
        "onnxruntime": lambda: one,
        "tensorrt": lambda: EnginePredictor(one.contract, load_predictor(graph("engine.onnx", task="mask"))),
        "buckets": lambda: SizeBucketPredictor([one, tall]),
    }


def same(found: Detections, expected: Detections) -> bool:
    arrays = ("boxes", "scores", "labels", "masks", "keypoints")
    pairs = [(getattr(found, name), getattr(expected, name)) for name in arrays]
    return all(a is b is None or np.array_equal(a, b) for a, b in pairs)


def assert_threads_agree(predictor: Predictor, images: list[np.ndarray]) -> None:
    expected = [predictor([image])[0] for image in images]
    assert len(expected[0]) and not same(expected[0], expected[1])
    kept = [copy.deepcopy(found) for found in expected]

    def work(thread: int) -> bool:
        order = [(thread + call) % len(images) for call in range(CALLS)]
        return all(same(predictor([images[index]])[0], kept[index]) for index in order)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))
    assert all(same(*pair) for pair in zip(expected, kept, strict=True)), "a later call changed an earlier result"


@pytest.mark.parametrize("kind", ["onnxruntime", "tensorrt", "buckets"])
def test_threads_share_a_graph(predictors, lamp, kind):
    boxes = [(2 + 5 * index, 3 + 2 * index, 14 + 5 * index, 20 + 2 * index) for index in range(THREADS)]
    assert_threads_agree(predictors[kind](), [lamp(SIZE, box) for box in boxes])


def small_torch_predictor(**changes: torch.Tensor) -> TorchPredictor:
    model = copy.deepcopy(reduced_detector("box"))
    for name, value in changes.items():
        model.get_parameter(name).data.view(-1)[0] = value
    return TorchPredictor(model, "box", Categories((1, 2, 3, 4, 5), (1, 2, 3, 4, 5), tuple("abcde")), device="cpu")


def test_threads_share_a_checkpoint():
    assert_threads_agree(small_torch_predictor(), list(blobs(2, (60, 75)).numpy()))


@pytest.mark.parametrize("name", ["backbone.body.conv1.weight", "roi_heads.box_predictor.cls_score.bias"])
def test_a_detector_that_computes_nan_says_so(name):
    with pytest.raises(UserError, match=r"model in memory: the scores .* not finite"):
        small_torch_predictor(**{name: float("nan")})(list(blobs(1).numpy()))


def test_a_graph_that_computes_nan_says_so(graph, lamp):
    path = graph()
    model = onnx.load(path)
    limits = next(tensor for tensor in model.graph.initializer if tensor.name == "limits")
    limits.CopyFrom(numpy_helper.from_array(np.array([[np.inf, np.nan]], np.float32), "limits"))
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"model\.onnx: its boxes are not finite"):
        load_predictor(path)([lamp(SIZE, (5, 6, 20, 30))])


def test_weights_that_are_not_finite_are_refused():
    model = copy.deepcopy(reduced_detector("box"))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["backbone.body.layer1.0.conv1.weight"].view(-1)[3] = float("inf")
    with pytest.raises(UserError, match=r"file: tensor 'backbone.*conv1\.weight' holds NaN"):
        load_weights(model, tensors, "file")

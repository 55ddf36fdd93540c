"""What can be checked of the engine backend without a GPU: manifests, buffer plans, messages."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.tensorrt_build import EngineManifest, manifest_path
from norton_deploy.files import sha256_of
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.tensorrt_backend import (
    BufferPlan,
    TensorRTPredictor,
    cache_path,
    check_runtime,
    make_context,
    plan_buffers,
    same_results,
    save_cache,
)

CONTRACT = {
    "format": 2,
    "task": "mask",
    "image_size": [32, 48],
    "input_size": [32, 48],
    "batch": 2,
    "max_detections": 5,
    "categories": {"labels": [1], "ids": [7], "names": ["lamp"]},
    "input_dtype": "uint8",
    "outputs": [
        {"name": "boxes", "dtype": "float", "shape": [2, 5, 4]},
        {"name": "nms_converged", "dtype": "bool", "shape": [1]},
    ],
    "target": "tensorrt",
    "precision": "fp32",
    "weights_sha256": "0" * 64,
    "resize": "letterbox",
    "score_threshold": 0.05,
    "mask_paste": "whole_pixels",
    "input_name": "images",
}
TENSORS = {
    "images": ((2, 32, 48, 3), np.uint8),
    "num_detections": ((2,), np.int32),
    "boxes": ((2, 5, 4), np.float32),
    "scores": ((2, 5), np.float32),
    "labels": ((2, 5), np.int32),
    "masks": ((2, 5, 28, 28), np.float32),
    "nms_converged": ((1,), np.bool_),
}
PACKAGE = SimpleNamespace(nptype=lambda dtype: dtype, TensorIOMode=SimpleNamespace(INPUT="in"))


class FakeEngine:
    """The part of an ICudaEngine that planning asks for."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.num_io_tensors = len(tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_shape(self, name):
        return self.tensors[name][0]

    def get_tensor_dtype(self, name):
        return self.tensors[name][1]

    def get_tensor_mode(self, name):
        return "in" if name == "images" else "out"


@pytest.fixture
def engine(tmp_path):
    """An engine file that holds no engine, with a manifest that matches it."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"not an engine")
    manifest = {
        "format": 2,
        "engine": "tensorrt-rtx",
        "engine_version": "1.7.1",
        "compute_capability": "86",
        "norton_deploy_version": "0.1.0",
        "graph_sha256": "0" * 64,
        "engine_sha256": sha256_of(path),
        "contract": CONTRACT,
    }
    manifest_path(path).write_text(json.dumps(manifest))
    return path


def test_manifest_is_read_and_checked_before_the_engine(engine):
    manifest = EngineManifest.load(engine)
    contract = manifest.contract
    assert (contract.task, contract.batch, contract.flags) == ("mask", 2, ("nms_converged",))
    assert manifest.engine == "tensorrt-rtx"
    engine.write_bytes(b"replaced")
    with pytest.raises(UserError, match="SHA-256"):
        load_predictor(engine)
    manifest_path(engine).unlink()
    with pytest.raises(UserError, match="no manifest"):
        load_predictor(engine)


def test_manifest_with_a_broken_contract_is_refused(engine):
    manifest = json.loads(manifest_path(engine).read_text())
    del manifest["contract"]["batch"]
    manifest_path(engine).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"model\.engine\.json.*'batch'"):
        load_predictor(engine)


def test_without_a_gpu_the_message_says_so(engine):
    with pytest.raises(UserError, match="NVIDIA GPU only"):
        load_predictor(engine, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="NVIDIA GPU only"):
            load_predictor(engine)


def test_version_and_compute_capability_must_match(engine):
    manifest = EngineManifest.load(engine)
    check_runtime(engine, manifest, "1.7.1", (8, 6))
    check_runtime(engine, replace(manifest, compute_capability="portable"), "1.7.1", (12, 0))
    with pytest.raises(UserError, match=r"built by tensorrt-rtx 1\.7\.1, installed is 1\.8"):
        check_runtime(engine, manifest, "1.8.0", (8, 6))
    with pytest.raises(UserError, match="capability 86, this GPU has 89"):
        check_runtime(engine, manifest, "1.7.1", (8, 9))


def test_buffers_are_planned_from_the_engine(engine):
    contract = EngineManifest.load(engine).contract
    plans = plan_buffers(FakeEngine(TENSORS), PACKAGE, contract, "e")
    assert plans[0] == BufferPlan("images", (2, 32, 48, 3), "uint8", True)
    assert {plan.name: plan.nbytes for plan in plans} == {
        "images": 2 * 32 * 48 * 3, "num_detections": 8, "boxes": 160, "scores": 40, "labels": 40,
        "masks": 2 * 5 * 28 * 28 * 4, "nms_converged": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ((2, 3, 32, 48), np.float32)}, "contradict the manifest"),
        ({"boxes": ((-1, 5, 4), np.float32)}, "'boxes'.*fixed shapes"),
        ({"scores": ((2, 5), np.complex64)}, "'scores' is complex64"),
        ({"masks": None}, "lacks the outputs masks"),
    ],
)
def test_engines_that_contradict_their_manifest_are_refused(engine, change, message):
    contract = EngineManifest.load(engine).contract
    tensors = {name: spec for name, spec in (TENSORS | change).items() if spec is not None}
    with pytest.raises(UserError, match=message):
        plan_buffers(FakeEngine(tensors), PACKAGE, contract, "e")


def test_contract_parses_back():
    contract = GraphContract.parse(json.dumps(CONTRACT), "c")
    assert json.loads(json.dumps(contract.to_json())) == {"float_layers": [], "weight_bits": 8} | CONTRACT
    assert contract.output_names == ("num_detections", "boxes", "scores", "labels", "masks", "nms_converged")
    assert contract.input_shape == (2, 32, 48, 3) and contract.score_threshold == 0.05
    assert contract.resize == "letterbox" and contract.input_size == contract.image_size
    with pytest.raises(UserError, match="not valid JSON"):
        GraphContract.parse("{", "c")


class FakeCache:
    """TensorRT-RTX's runtime cache: bytes that a run extends."""

    def __init__(self, content=b""):
        self.content = content

    def deserialize(self, content):
        self.content = bytes(content)

    def serialize(self):
        return self.content


class FakeRtxEngine:
    """The part of an ICudaEngine that makes a context."""

    device_memory_size_v2 = 64 << 20

    def __init__(self, context):
        self.context = context
        self.config = SimpleNamespace(create_runtime_cache=FakeCache, set_runtime_cache=self.keep)
        self.cache = None

    def keep(self, cache):
        self.cache = cache

    def create_runtime_config(self):
        return self.config

    def create_execution_context(self, *config):
        return self.context


RTX = SimpleNamespace(__name__="tensorrt_rtx", CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"))
TRT = SimpleNamespace(__name__="tensorrt")


def test_no_context_is_one_line(engine):
    for package in (RTX, TRT):
        with pytest.raises(UserError, match=rf"{package.__name__} made no execution context.*64 MiB"):
            make_context(FakeRtxEngine(None), package, engine)


def test_compiled_kernels_are_kept_for_the_next_start(engine):
    first = FakeRtxEngine("context")
    context, cache = make_context(first, RTX, engine)
    assert context == "context" and first.cache is cache and first.config.cuda_graph_strategy == "whole"
    save_cache(cache, engine)
    assert not cache_path(engine).exists()  # nothing was compiled
    cache.content = b"kernels"
    save_cache(cache, engine)
    _, again = make_context(FakeRtxEngine("context"), RTX, engine)
    assert again.content == b"kernels"
    assert make_context(FakeRtxEngine("context"), TRT, engine) == ("context", None)


def test_a_replay_must_give_the_same_results():
    assert same_results(torch.tensor([True, False]), torch.tensor([True, False]))
    assert not same_results(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert not same_results(torch.tensor([1.0]), torch.tensor([torch.nan]))


def test_layers_are_timed_in_an_ordinary_run():
    package = SimpleNamespace(IProfiler=object)
    predictor = TensorRTPredictor.__new__(TensorRTPredictor)
    predictor._package, predictor._graph, predictor._context = package, "recorded", SimpleNamespace(profiler=None)

    def run(batch):
        assert predictor._graph is None
        for layer, ms in (("conv1", 1.5), ("top", 0.25), ("conv1", 0.5)):
            predictor._context.profiler.report_layer_time(layer, ms)

    predictor.run = run
    assert predictor.layer_times_ms(np.zeros(1)) == {"conv1": 2.0, "top": 0.25}
    assert predictor._graph == "recorded" and predictor._context.profiler is None

"""A detector compiled by torch ahead of time finds what it found before; on the CPU, since no GPU is needed."""

import numpy as np
import pytest
import torch
from reduced_detectors import IMAGE_SIZE, blobs

from norton_deploy.compression.lowering import lower_model
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.export.torch_package import build_package
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.parity.engine_check import check_engine
from norton_deploy.parity.gate import check_parity
from norton_deploy.parity.references import Example
from norton_deploy.parity.verification import ReferenceFile, reference_path


@pytest.mark.slow
def test_a_package_finds_what_the_model_finds(exported, tmp_path):
    model, graph = exported("box", "tensorrt")
    frames, examples = list(blobs(3).numpy()), list[Example]()
    check_parity(model, graph, frames, keep=examples).require()
    contract = OnnxRuntimePredictor(graph, device="cpu").contract
    own = tmp_path / "model.onnx"
    own.write_bytes(graph.read_bytes())
    ReferenceFile.of(contract, "fp32", model, examples).save(reference_path(own))
    settings = GraphSettings(IMAGE_SIZE, batch=2, target="tensorrt", nms_iterations=12)
    # compiles sooner: no optimised wrapper, no vectors
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.simdlen": 0}):
        detector = StaticRCNN(lower_model(model), settings)
        built = build_package(detector, own, tmp_path / "model.pt2", torch.device("cpu"))
    checked = check_engine(built, report=lambda _: None)
    assert checked.manifest is not None and checked.manifest.ran
    predictor = load_predictor(checked.file, device="cpu")
    assert predictor.backend == "aotinductor" and "AOTInductor" in predictor.device
    for found, expected in zip(predictor(frames), OnnxRuntimePredictor(own, device="cpu")(frames), strict=True):
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-2)
        np.testing.assert_array_equal(found.labels, expected.labels)

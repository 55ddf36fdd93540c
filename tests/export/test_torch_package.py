"""A detector compiled by torch ahead of time: built, compared, loaded, refused; on the CPU, since no GPU is needed."""

import json

import numpy as np
import pytest
import torch
from reduced_detectors import IMAGE_SIZE, blobs

from norton_deploy.compression.lowering import lower_model
from norton_deploy.errors import UserError
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.export.tensorrt_build import EngineManifest, manifest_path
from norton_deploy.export.torch_package import build_package
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.parity.engine_check import check_engine, why_not_run
from norton_deploy.parity.gate import check_parity
from norton_deploy.parity.references import Example
from norton_deploy.parity.verification import ReferenceFile, reference_path

CPU = torch.device("cpu")


def test_a_compiler_that_fails_is_one_line(exported, tmp_path, monkeypatch):
    _, graph = exported("box", "tensorrt")

    def fail(*_args, **_options):
        raise RuntimeError("C++ compile error\n" + "x" * 1000)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    monkeypatch.setattr(torch.export, "export", lambda *_args, **_options: None)
    with pytest.raises(UserError, match=r"m\.pt2: torch .* cannot compile it for cpu: C\+\+ compile error$"):
        build_package(torch.nn.Identity(), graph, tmp_path / "m.pt2", CPU)
    assert not list(tmp_path.iterdir())


def test_a_package_is_checked_against_its_manifest(exported, tmp_path, monkeypatch):
    _, graph = exported("box", "tensorrt")
    made = tmp_path / "made.pt2"
    made.write_bytes(b"compiled")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_args, **_options: str(made))
    monkeypatch.setattr(torch.export, "export", lambda *_args, **_options: None)
    out = tmp_path / "m.pt2"
    built = build_package(torch.nn.Identity(), graph, out, CPU)
    assert built.manifest is not None and "for the CPU" in built.text()
    assert built.manifest.engine == "aotinductor" and built.manifest == EngineManifest.load(out)
    assert why_not_run(built.manifest, graph) == ""
    with pytest.raises(UserError, match=r"m\.pt2: torch cannot load it"):
        load_predictor(out)
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(UserError, match=r"compiled for torch .*, here it is 9\.9; run norton export_torch here"):
        load_predictor(out)
    monkeypatch.undo()
    fields = json.loads(manifest_path(out).read_text())
    manifest_path(out).write_text(json.dumps(fields | {"compute_capability": "90"}))
    with pytest.raises(UserError, match=r"CUDA GPU|compute capability 90"):
        load_predictor(out)
    manifest_path(out).write_text(json.dumps(fields | {"engine": "tensorrt"}))
    with pytest.raises(UserError, match="made by tensorrt, whose files are not called so"):
        load_predictor(out)
    out.write_bytes(b"another")
    manifest_path(out).write_text(json.dumps(fields))
    with pytest.raises(UserError, match="SHA-256"):
        load_predictor(out)


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
    built = build_package(StaticRCNN(lower_model(model), settings), own, tmp_path / "model.pt2", CPU)
    checked = check_engine(built, report=lambda _: None)
    assert checked.manifest is not None and checked.manifest.ran
    predictor = load_predictor(checked.file, device="cpu")
    assert predictor.backend == "aotinductor" and "AOTInductor" in predictor.device
    for found, expected in zip(predictor(frames), OnnxRuntimePredictor(own, device="cpu")(frames), strict=True):
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-2)
        np.testing.assert_array_equal(found.labels, expected.labels)

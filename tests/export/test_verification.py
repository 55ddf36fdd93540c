"""References that travel beside a model file: ONNX Runtime stands in for an engine's runtime."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reduced_detectors import IMAGE_SIZE, blobs

from norton_deploy import commands
from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import read_contract
from norton_deploy.export.tensorrt_build import NOT_RUN, EngineBuild, EngineManifest, manifest_path
from norton_deploy.files import sha256_of
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.parity import engine_check
from norton_deploy.parity.eager_stages import EagerStages
from norton_deploy.parity.engine_check import check_engine
from norton_deploy.parity.references import Example
from norton_deploy.parity.report import TOLERANCES
from norton_deploy.parity.verification import ReferenceFile, reference_path, verify, verify_once


@pytest.fixture
def shipped(exported: Callable, tmp_path: Path) -> Path:
    """A mask detector's graph with its references beside it."""
    model, graph = exported("mask", "onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.read_bytes())
    images = blobs(2, seed=5).numpy()
    examples = map(Example, images, EagerStages(model, IMAGE_SIZE, 20).references(images, TOLERANCES["fp32"]))
    ReferenceFile.of(read_contract(path), "fp32", model, list(examples)).save(reference_path(path))
    return path


def shifted(path: Path, pixels: float) -> OnnxRuntimePredictor:
    """A runtime that computes something else than it should."""
    predictor = OnnxRuntimePredictor(path, device="cpu")
    run = predictor.run
    predictor.run = lambda batch: (found := run(batch)) | {"boxes": found["boxes"] + pixels}  # type: ignore[method-assign]
    return predictor


def test_a_graph_is_verified_where_it_runs(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run("verify_engine", ["--model", str(shipped), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and report["compared"] == {"boxes": 40, "masks": 40}
    assert "detects what the model detects" in capsys.readouterr().err
    references = ReferenceFile.load(reference_path(shipped))
    with pytest.raises(UserError, match="in stage 'final': box distance"):
        verify(shifted(shipped, 1.0), references).require()
    blank = Example(np.zeros_like(references.examples[0].frame), references.examples[0].reference)
    with pytest.raises(UserError, match="in stage 'final'"):
        verify(shifted(shipped, 0.0), replace(references, examples=(blank,))).require()
    with pytest.raises(UserError, match="not checked: 0 pairs"):
        verify(shifted(shipped, 0.0), replace(references, examples=())).require()
    other = replace(references, contract=replace(references.contract, score_threshold=0.5))
    with pytest.raises(UserError, match="another graph"):
        verify(shifted(shipped, 0.0), other)


def test_only_at_the_first_load(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_predictor(shipped, device="cpu", check=verify_once)
    reference_path(shipped).unlink()
    load_predictor(shipped, device="cpu", check=verify_once)
    shipped.with_name("model.onnx.verified.json").unlink()
    with pytest.raises(UserError, match="no reference detections"):
        load_predictor(shipped, device="cpu", check=verify_once)
    reference_path(shipped).write_bytes(b"PK")
    with pytest.raises(UserError, match="not a file of reference detections"):
        load_predictor(shipped, device="cpu", check=verify_once)


def test_an_engine_is_run_where_it_was_built_if_it_can(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = shipped.with_name("other.engine")
    engine.write_bytes(b"engine")
    manifest = EngineManifest("tensorrt-rtx", "1.7", "86", "0.1", "", sha256_of(engine), read_contract(shipped))
    build = EngineBuild(shipped, engine, "tensorrt-rtx", manifest)
    quiet: list[str] = []

    monkeypatch.setattr(engine_check, "local_capability", lambda: None)
    checked = check_engine(build).manifest
    assert checked is not None and checked.checked.startswith(f"{NOT_RUN}: no GPU here")
    assert EngineManifest.load(engine).checked == checked.checked and reference_path(engine).is_file()

    monkeypatch.setattr(engine_check, "local_capability", lambda: "90")
    assert "compute capability 90" in check_engine(build).text()

    monkeypatch.setattr(engine_check, "local_capability", lambda: "86")
    passed = check_engine(build, load=lambda _: shifted(shipped, 0.0), report=quiet.append)
    assert "equal to eager mode on 2 images (40 detections)" in passed.text() and "final" in quiet[0]
    with pytest.raises(UserError, match="in stage 'final'"):
        check_engine(build, load=lambda _: shifted(shipped, 1.0), report=quiet.append)
    assert not engine.exists() and not manifest_path(engine).exists()
    assert engine.with_suffix(".unchecked.engine").is_file()
    assert check_engine(replace(build, manifest=None)).manifest is None

"""Engines: TensorRT-RTX really builds here, without a GPU; they cannot be run here."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from norton_deploy.errors import UserError
from norton_deploy.export import tensorrt_build
from norton_deploy.export.onnx_export import read_contract
from norton_deploy.export.tensorrt_build import (
    EngineManifest,
    EngineUnavailableError,
    build_engine,
    builder_config,
    engine_package,
    manifest_path,
    target_commands,
)
from norton_deploy.files import sha256_of
from norton_deploy.structures import TASKS, Task

needs_rtx = pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed")


QUICK = ("mask", "fp16", True)
"""The one that belongs to the quick tests."""
ENGINES = [
    pytest.param(task, precision, compressed, marks=() if (task, precision, compressed) == QUICK else pytest.mark.slow)
    for task in TASKS
    for precision, compressed in (("fp32", task == "box"), ("fp16", task != "box"))
]
"""Every pair of task, precision and compression; all of them at full size are in benchmarks/engine_builds.py."""


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize(("task", "precision", "compressed"), ENGINES)
def test_rtx_engine_is_built_for_an_rtx_3060(
    task: Task, precision: str, compressed: bool, exported: Callable, tmp_path: Path
) -> None:
    _, graph = exported(task, "tensorrt", precision, compressed)
    engine = tmp_path / "model.engine"
    manifest = build_engine(graph, engine, engine="tensorrt-rtx", compute_capability="86")
    assert engine.stat().st_size > 1_000_000
    assert (manifest.compute_capability, manifest.contract.precision) == ("86", precision)
    assert manifest.graph_sha256 == sha256_of(graph)
    assert manifest.contract.task == task
    assert EngineManifest.load(engine) == manifest


def test_loader_checks_before_anything_is_deserialised(exported: Callable, tmp_path: Path) -> None:
    _, graph = exported("box", "tensorrt")
    engine = tmp_path / "model.engine"
    with pytest.raises(UserError, match="no such engine"):
        EngineManifest.load(engine)
    engine.write_bytes(b"engine")
    with pytest.raises(UserError, match="no manifest"):
        EngineManifest.load(engine)
    manifest = EngineManifest("tensorrt-rtx", "1.7", "86", "0.1", "", sha256_of(engine), read_contract(graph))
    content = manifest.to_json()
    manifest_path(engine).write_text(json.dumps(content))
    assert EngineManifest.load(engine) == manifest
    engine.write_bytes(b"Engine")
    with pytest.raises(UserError, match="SHA-256"):
        EngineManifest.load(engine)
    manifest_path(engine).write_text(json.dumps(content | {"format": 1}))
    with pytest.raises(UserError, match="another version"):
        EngineManifest.load(engine)
    manifest_path(engine).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        EngineManifest.load(engine)


@needs_rtx
def test_mistakes_are_named(exported: Callable, tmp_path: Path) -> None:
    _, native = exported("box", "onnxruntime")
    with pytest.raises(UserError, match="target 'onnxruntime'"):
        build_engine(native, tmp_path / "a.engine")
    _, graph = exported("box", "tensorrt")
    with pytest.raises(UserError, match=r"'42'.*86"):
        build_engine(graph, tmp_path / "a.engine", compute_capability="42")
    assert not list(tmp_path.iterdir())


def test_absent_package_or_gpu_is_one_line(exported: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = exported("box", "tensorrt")
    monkeypatch.setitem(tensorrt_build.MODULE_OF_ENGINE, "tensorrt", "no_such_package")
    with pytest.raises(EngineUnavailableError, match="not installed"):
        build_engine(graph, tmp_path / "a.engine", engine="tensorrt")
    monkeypatch.setattr(tensorrt_build, "local_capability", lambda: None)
    with pytest.raises(EngineUnavailableError, match="no GPU"):
        tensorrt_build.require_gpu(None)
    monkeypatch.setattr(tensorrt_build, "local_capability", lambda: "86")
    tensorrt_build.require_gpu("86")
    with pytest.raises(EngineUnavailableError, match="86, not 89"):
        tensorrt_build.require_gpu("89")


def test_commands_for_the_target() -> None:
    own, nvidia = target_commands("m.onnx", "m.engine", "tensorrt")
    assert own == "norton export_trt --onnx m.onnx --engine tensorrt --out m.engine"
    assert nvidia == "trtexec --onnx=m.onnx --stronglyTyped --saveEngine=m.engine"
    own, nvidia = target_commands("my models/m.onnx", "m;ls.engine", "tensorrt-rtx")
    assert own == "norton export_trt --onnx 'my models/m.onnx' --engine tensorrt-rtx --out 'm;ls.engine'"
    assert nvidia == "tensorrt_rtx '--onnx=my models/m.onnx' '--saveEngine=m;ls.engine'"


@needs_rtx
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("fp16", False), ("tf32", True)])
def test_only_tf32_may_round_products(precision: str, tf32: bool) -> None:
    import tensorrt_rtx

    package = engine_package("tensorrt-rtx")
    config = builder_config(package, package.Builder(tensorrt_rtx.Logger()), precision)
    assert config.get_flag(package.BuilderFlag.TF32) == tf32


def test_kernel_times_of_an_earlier_build_are_used(tmp_path: Path) -> None:
    given: list[object] = []
    config = SimpleNamespace(
        clear_flag=given.append,
        create_timing_cache=lambda known: ("cache", known),
        set_timing_cache=lambda cache, ignore_mismatch: given.append((cache, ignore_mismatch)),
    )
    package = SimpleNamespace(BuilderFlag=SimpleNamespace(TF32="tf32"))
    builder = SimpleNamespace(create_builder_config=lambda: config)
    timings = tmp_path / "m.engine.timings"
    builder_config(package, builder, "fp32", timings)  # type: ignore[arg-type]
    timings.write_bytes(b"times")
    builder_config(package, builder, "tf32", timings)  # type: ignore[arg-type]
    assert given == [(("cache", b""), False), "tf32", (("cache", b"times"), False)]

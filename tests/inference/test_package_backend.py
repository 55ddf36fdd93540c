"""AOTInductor packages: what is checked before one is loaded, and what is said when torch cannot make one."""

import json
from types import SimpleNamespace

import pytest
import torch

from norton_deploy.commands import export_torch
from norton_deploy.errors import UserError
from norton_deploy.export.tensorrt_build import EngineManifest, manifest_path
from norton_deploy.export.torch_package import build_package
from norton_deploy.inference.loading import load_predictor
from norton_deploy.parity.engine_check import why_not_run

CPU = torch.device("cpu")


def test_a_compiler_that_fails_is_one_line(graph, tmp_path, monkeypatch):

    def fail(*_args, **_options):
        raise RuntimeError("C++ compile error\n" + "x" * 1000)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    monkeypatch.setattr(torch.export, "export", lambda *_args, **_options: None)
    with pytest.raises(UserError, match=r"m\.pt2: torch .* cannot compile it for cpu: C\+\+ compile error$"):
        build_package(torch.nn.Identity(), graph(target="tensorrt"), tmp_path / "m.pt2", CPU)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx"}


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_only_tf32_is_compiled_with_tf32(precision, tmp_path, monkeypatch):
    export = SimpleNamespace(contract=SimpleNamespace(image_size=(32, 48)))
    monkeypatch.setattr(export_torch.export_onnx, "run_export", lambda *_: export)
    monkeypatch.setattr(export_torch.export_onnx, "open_model_of", lambda _: [None])
    for name in ("fix_sampling", "static_detector"):
        monkeypatch.setattr(export_torch, name, lambda *_: None)
    found = []

    def compile_it(*_):
        found.append(torch.backends.cudnn.allow_tf32)
        raise UserError("enough")

    monkeypatch.setattr(export_torch, "build_package", compile_it)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(UserError, match="enough"):
        export_torch.main(
            ["--task", "box", "--precision", precision, "--device", "cpu", "--out", str(tmp_path / "m.pt2")]
        )
    assert found == [precision == "tf32"]


def test_a_package_is_checked_against_its_manifest(graph, tmp_path, monkeypatch):
    made = tmp_path / "made.pt2"
    made.write_bytes(b"compiled")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_args, **_options: str(made))
    monkeypatch.setattr(torch.export, "export", lambda *_args, **_options: None)
    out = tmp_path / "m.pt2"
    built = build_package(torch.nn.Identity(), graph(target="tensorrt"), out, CPU)
    assert built.manifest is not None and "for the CPU" in built.text()
    assert built.manifest.engine == "aotinductor" and built.manifest == EngineManifest.load(out)
    assert why_not_run(built.manifest, built.graph) == ""
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

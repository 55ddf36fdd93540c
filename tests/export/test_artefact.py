"""The artefact folder: its clients detect what the predictor detects, its texts say what the contract says."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from PIL import Image
from reduced_detectors import IMAGE_SIZE

from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.export.artefact import Source, _readme_values, write_artefact
from norton_deploy.export.onnx_export import read_contract
from norton_deploy.export.tensorrt_build import EngineManifest, manifest_path
from norton_deploy.files import sha256_of
from norton_deploy.inference.loading import load_predictor

SCENE = draw_scene(7, (150, 211)).image
HEADERS = os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime")


@pytest.fixture(scope="session")
def artefact(exported: Callable[..., Any], once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Of a reduced mask detector, two images a run."""
    _, graph = exported("mask", "onnxruntime")
    return once("artefact", lambda folder: write_artefact(folder, graph) and None)


def client(folder: Path) -> tuple[Any, Any]:
    spec = importlib.util.spec_from_file_location("detect", folder / "python" / "detect.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Detector(folder / "model.onnx"), module


@pytest.mark.slow
@pytest.mark.parametrize("size", [IMAGE_SIZE, (150, 211), (211, 90), (40, 64)])
def test_the_python_client_detects_what_the_predictor_detects(
    artefact: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = draw_scene(7, size).image
    expected = load_predictor(artefact)([image])[0]
    detector, module = client(artefact)
    if size != IMAGE_SIZE:  # random weights make much of a pixel that is one level brighter: resize alike
        monkeypatch.setattr(module, "resize", lambda image, rows, columns: cv2.resize(image, (columns, rows)))
    found = detector(image)
    assert len(expected) == len(found["boxes"]) > 3
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-5)
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=1e-3)
    labels = [expected_name(detector, label) for label in expected.labels]
    assert found["names"] == labels
    assert found["masks"].shape[0] == len(expected) and found["mask_boxes"].shape == found["boxes"].shape


def expected_name(detector: Any, label: int) -> str:
    return str(detector.contract["categories"]["names"][detector.contract["categories"]["labels"].index(int(label))])


def test_the_python_client_resizes_as_opencv(artefact: Path) -> None:
    _, module = client(artefact)
    for rows, columns in [(120, 150), (75, 60), (300, 401), (1, 1)]:
        difference = cv2.resize(SCENE, (columns, rows)).astype(int) - module.resize(SCENE, rows, columns)
        assert np.abs(difference).max() <= 1


def test_the_python_client_runs_alone(artefact: Path, tmp_path: Path) -> None:
    Image.fromarray(SCENE).save(tmp_path / "scene.png")
    script = artefact / "python" / "detect.py"
    code = (
        "import runpy, sys; sys.argv = ['detect.py', 'scene.png'];"
        f"runpy.run_path({str(script)!r}, run_name='__main__');"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'norton_deploy', 'torch', 'cv2'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert len(lines) > 3


@pytest.mark.skipif(
    not (Path(HEADERS) / "onnxruntime_cxx_api.h").is_file() or shutil.which("cmake") is None,
    reason="needs cmake and ONNX Runtime's C++ headers (ONNXRUNTIME_INCLUDE)",
)
def test_the_cpp_client_detects_what_the_python_client_detects(artefact: Path, tmp_path: Path) -> None:
    wheel = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(wheel)
    paths = [f"-DONNXRUNTIME_INCLUDE={HEADERS}", f"-DONNXRUNTIME_LIBRARY={tmp_path / 'libonnxruntime.so.1'}"]
    options = ["-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror -O0", *paths]
    subprocess.run(["cmake", "-S", artefact / "cpp", "-B", tmp_path / "build", *options], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
    # Exactly halved, so that no rounding differs between the clients.
    scene = draw_scene(7, (2 * IMAGE_SIZE[0], 2 * IMAGE_SIZE[1])).image
    Image.fromarray(scene).save(tmp_path / "scene.ppm")
    done = subprocess.run(
        [tmp_path / "build" / "detect", artefact / "model.onnx", tmp_path / "scene.ppm"],
        capture_output=True, text=True, check=True, env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    expected = client(artefact)[0](scene)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[1] for row in rows] == expected["names"]
    np.testing.assert_allclose([float(row[0]) for row in rows], expected["scores"], atol=1e-3)
    np.testing.assert_allclose([[float(side) for side in row[2:]] for row in rows], expected["boxes"], atol=0.1)
    bad = subprocess.run([tmp_path / "build" / "detect", "absent.onnx", tmp_path / "scene.ppm"], capture_output=True)
    assert bad.returncode == 1 and b"error: " in bad.stderr


def test_labels_contract_and_standard_metadata(artefact: Path) -> None:
    contract = read_contract(artefact / "model.onnx")
    assert (artefact / "labels.txt").read_text().split() == ["background", *"abcde"]
    assert json.loads((artefact / "contract.json").read_text()) == json.loads(json.dumps(contract.to_json()))
    model = onnx.load(artefact / "model.onnx")
    assert model.producer_name == "norton_deploy" and model.producer_version
    assert "Detector (mask) of 5 categories" in model.doc_string
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["names"])["1"] == "a" and metadata["description"] == model.doc_string
    assert all(output.doc_string for output in model.graph.output)
    header = (artefact / "cpp" / "contract.h").read_text()
    assert '{1, "a"},' in header and "INPUT_SHAPE{2, " in header
    readme = (artefact / "README.md").read_text()
    assert "$" not in readme.replace("$PWD", "") and all(f"`{output.name}`" in readme for output in contract.outputs)


def test_the_triton_configuration_fits_tritons_schema_and_the_graph(artefact: Path) -> None:
    schema = model_config_pb2()
    folder = artefact / "triton" / "detector"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.name == folder.name and config.backend == "onnxruntime" and config.max_batch_size == 0
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    kinds = {"tensor(uint8)": "UINT8", "tensor(float)": "FP32", "tensor(int32)": "INT32", "tensor(bool)": "BOOL"}

    def tensors(entries: Any) -> dict[str, Any]:
        name_of = schema.DataType.Name
        return {entry.name: (name_of(entry.data_type), list(entry.dims)) for entry in entries}

    def wanted(entries: Any) -> dict[str, Any]:
        return {entry.name: (f"TYPE_{kinds[entry.type]}", list(entry.shape)) for entry in entries}

    assert tensors(config.input) == wanted(session.get_inputs())
    assert tensors(config.output) == wanted(session.get_outputs())
    [warmup] = config.model_warmup
    assert list(warmup.inputs["images"].dims) == list(config.input[0].dims) and warmup.inputs["images"].zero_data


def model_config_pb2() -> Any:
    """Triton's schema, without tritonclient.grpc's own requirements."""
    spec = importlib.util.find_spec("tritonclient")
    assert spec is not None and spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    source = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert source is not None and source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_an_engines_artefact(artefact: Path, tmp_path: Path, engine: Any) -> None:
    built = tmp_path / "small.engine"
    built.write_bytes(b"an engine")
    contract = read_contract(artefact / "model.onnx")
    manifest = EngineManifest(engine, "1", "86", "0", "", sha256_of(built), contract)
    manifest_path(built).write_text(json.dumps(manifest.to_json()))
    model = write_artefact(tmp_path / "out", built)
    assert EngineManifest.load(model) == manifest
    entries = {path.name for path in (tmp_path / "out").iterdir()}
    common = {"model.engine", "model.engine.json", "contract.json", "labels.txt", "README.md", "cpp"}
    option = {"tensorrt": "tensorrt -DTENSORRT_ROOT", "tensorrt-rtx": "tensorrt -DTENSORRT_NAME=tensorrt_rtx -DTENS"}
    assert f"-B cpp/build -DENGINE={option[engine]}" in (tmp_path / "out" / "README.md").read_text()
    assert entries == (common | {"triton"} if engine == "tensorrt" else common)
    if engine == "tensorrt":
        plan = tmp_path / "out" / "triton" / "detector" / "1" / "model.plan"
        assert plan.read_bytes() == b"an engine"
        assert 'platform: "tensorrt_plan"' in (plan.parents[1] / "config.pbtxt").read_text()


def test_a_graph_for_tensorrt_says_how_its_engine_is_built(artefact: Path) -> None:
    contract = read_contract(artefact / "model.onnx")
    for target, said in (("tensorrt", True), ("onnxruntime", False)):
        values = _readme_values(Source(Path("m.onnx"), replace(contract, target=target), ""), "model.onnx", [])
        assert ("norton export_trt --onnx model.onnx" in str(values["usage"])) == said


def test_only_an_artefact_is_replaced(artefact: Path, tmp_path: Path) -> None:
    graph, mine = artefact / "model.onnx", tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.jpg").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"mine: holds something"):
            write_artefact(mine, graph, overwrite=overwrite)
    assert [path.name for path in mine.iterdir()] == ["photo.jpg"]
    write_artefact(tmp_path / "out", graph)
    (tmp_path / "out" / "labels.txt").write_text("old")
    with pytest.raises(UserError, match="holds something already"):
        write_artefact(tmp_path / "out", graph)
    write_artefact(tmp_path / "out", graph, overwrite=True)
    assert (tmp_path / "out" / "labels.txt").read_text() != "old"
    with pytest.raises(UserError, match="made from a graph"):
        write_artefact(tmp_path / "new", tmp_path / "model.pth")
    assert not (tmp_path / "new").exists()

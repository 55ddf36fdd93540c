"""OpenVINO runs the graphs that ONNX Runtime runs, `.onnx` and `.xml`, and says what it cannot do."""

import subprocess
import sys

import numpy as np
import pytest

from norton_deploy.cost.openvino_session import openvino_core, openvino_package
from norton_deploy.errors import UserError
from norton_deploy.inference.loading import SizeBucketPredictor, load_predictor
from norton_deploy.inference.openvino_backend import OpenVinoPredictor


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_both_engines_find_the_same(graph, lamp, task, dtype):
    file = graph(task=task, dtype=dtype, batch=2)
    images = [lamp((32, 48), (5, 6, 20, 30)), lamp((64, 96), (20, 10, 60, 50)), lamp((32, 48), (1, 2, 9, 9))]
    for found, expected in zip(
        load_predictor(file, backend="openvino")(images), load_predictor(file)(images), strict=True
    ):
        for name in ("boxes", "scores", "labels", "masks", "keypoints"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_xml_carries_the_contract_and_a_folder_of_them_is_one_detector(graph, lamp, tmp_path):
    landscape, portrait = graph(name="a.onnx"), graph(name="b.onnx", image_size=(48, 32))
    folder = tmp_path / "xml"
    folder.mkdir()
    for file in (landscape, portrait):
        model = openvino_core().read_model(str(file))
        openvino_package().save_model(model, str(folder / f"{file.stem}.xml"), compress_to_fp16=False)
    predictor = load_predictor(folder)
    assert isinstance(predictor, SizeBucketPredictor) and predictor.backend == "openvino"
    assert load_predictor(folder / "a.xml").contract == load_predictor(landscape).contract
    [found] = predictor([lamp((48, 32), (5, 6, 20, 30))])
    np.testing.assert_array_equal(found.boxes, [[5, 6, 20, 30]])


def test_threads_float_type_and_cache(graph, lamp, tmp_path, monkeypatch):
    file = graph()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    predictor = load_predictor(file, backend="openvino", cache=tmp_path / "cache")
    assert predictor.device.endswith("CPU, fp32, 1 thread")
    assert any((tmp_path / "cache").iterdir())
    assert predictor._compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    two = load_predictor(file, backend="openvino", threads=2)
    assert two._compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert load_predictor(file, threads=2).device.endswith("2 threads")
    first, second = lamp((32, 48), (5, 6, 20, 30)), lamp((32, 48), (1, 2, 9, 9))
    [kept] = predictor([first])
    predictor([second])
    np.testing.assert_array_equal(kept.boxes, [[5, 6, 20, 30]])  # not overwritten by the next call
    assert min(predictor.timing.infer_ms, predictor.timing.copy_ms) > 0


def test_signals_arrive_after_a_predictor_ended_in_another_thread(graph):
    code = """if True:
        import gc, os, signal, sys, threading
        from norton_deploy import load_predictor
        predictors = [load_predictor(sys.argv[1], backend="openvino")]
        thread = threading.Thread(target=lambda: (predictors.clear(), gc.collect()))
        thread.start()
        thread.join()
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    assert subprocess.run([sys.executable, "-X", "faulthandler", "-c", code, str(graph())]).returncode == 7


def test_profile_names_the_nodes(graph, lamp):
    predictor = OpenVinoPredictor(graph(), profile=True)
    predictor([lamp((32, 48), (5, 6, 20, 30))])
    assert predictor.profile_ms() and set(predictor.profile_ms()) <= set(predictor.fused_names()) | {"images"}


def test_what_it_refuses(graph, tmp_path, monkeypatch):
    file = graph()
    with pytest.raises(UserError, match="onnxruntime or openvino can"):
        load_predictor(file, backend="torch")
    with pytest.raises(UserError, match="runs on the CPU only"):
        load_predictor(file, backend="openvino", device="cuda")
    with pytest.raises(UserError, match="float_type: not an option of backend onnxruntime"):
        load_predictor(file, float_type="bf16")
    with pytest.raises(UserError, match="float_type fp16: fp32 or bf16"):
        load_predictor(file, backend="openvino", float_type="fp16")
    with pytest.raises(UserError, match="contradict the metadata"):
        load_predictor(graph(name="lie.onnx", graph_dtype="float32"), backend="openvino")
    with pytest.raises(UserError, match="lacks the outputs boxes"):
        load_predictor(graph(name="poor.onnx", skip_output="boxes"), backend="openvino")
    (tmp_path / "broken.xml").write_text("<net")
    with pytest.raises(UserError, match="OpenVINO cannot load it"):
        load_predictor(tmp_path / "broken.xml")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'norton-deploy\[openvino\]'"):
        load_predictor(file, backend="openvino")

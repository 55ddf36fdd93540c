"""The gate on OpenVINO: the shipped graphs in fp32 within the limits of fp32, in bf16 within limits of their own."""

from collections.abc import Callable

import pytest
from reduced_detectors import blobs

from norton_deploy.inference.openvino_backend import OpenVinoPredictor
from norton_deploy.parity.gate import check_parity


@pytest.mark.parametrize(
    "task", ["mask", *(pytest.param(task, marks=pytest.mark.slow) for task in ("box", "keypoint"))]
)
def test_openvino_passes_the_gate_of_fp32(task: str, exported: Callable) -> None:
    model, path = exported(task, "onnxruntime")
    report = check_parity(model, path, list(blobs(2, seed=5).numpy()), predictor=OpenVinoPredictor(path))
    assert report.passed, report.table()
    assert report.detections == 40

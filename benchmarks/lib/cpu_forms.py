"""A detector in each precision and engine that a CPU has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.export.contract import GraphContract, Precision
from norton_deploy.export.equalise import equalised
from norton_deploy.export.letterbox import letterboxed
from norton_deploy.export.quantise import Ranges, calibrate, cpu_of_this_machine, write_quantised
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import Backend, FloatType, Image
from norton_deploy.inference.static_graph import StaticGraphPredictor
from norton_deploy.parity.checked_quantisation import calibration_images
from norton_deploy.parity.export_checked import ExportOptions, export_checked
from norton_deploy.structures import Categories, Task

Form = tuple[Precision, Backend, FloatType | None]
FP32 = "fp32, ONNX Runtime"
FORMS: dict[str, Form] = {
    FP32: ("fp32", "onnxruntime", None),
    "fp32, OpenVINO": ("fp32", "openvino", "fp32"),
    "bf16, OpenVINO": ("fp32", "openvino", "bf16"),
    "int8, ONNX Runtime": ("int8", "onnxruntime", None),
    "int8, OpenVINO": ("int8", "openvino", "fp32"),
}
"""What it is called -> the graph's precision, the engine, and OpenVINO's inference precision."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
"""Of the graphs that these forms need."""


def opened(file: Path, form: Form) -> StaticGraphPredictor:
    """A graph on the CPU."""
    _, backend, float_type = form
    options: dict[str, Any] = {} if float_type is None else {"float_type": float_type}
    predictor = load_predictor(file, device="cpu", backend=backend, **options)
    assert isinstance(predictor, StaticGraphPredictor)
    return predictor


@dataclass(frozen=True)
class Graphs:
    """A trained detector, its graphs by precision, and what they were made from.

    Attributes:
        calibrated: the fp32 graph that `ranges` belong to.
        batches: the calibration images, uint8 [1, H, W, 3].
    """

    model: GeneralizedRCNN
    task: Task
    categories: Categories
    contract: GraphContract
    files: dict[Precision, Path]
    calibrated: onnx.ModelProto
    ranges: Ranges
    batches: Sequence[Image]


def write_graphs(checkpoint_file: Path, stem: Path, options: ExportOptions) -> Graphs:
    """STEM_fp32.onnx, checked, and STEM_int8.onnx, calibrated as `options` say and not checked."""
    checkpoint = open_model(str(checkpoint_file))
    categories, model, task = checkpoint.header.categories, checkpoint.model.eval(), checkpoint.header.task
    assert isinstance(model, GeneralizedRCNN) and task != "cls"
    files = {name: stem.with_name(f"{stem.name}_{name}.onnx") for name in PRECISIONS}
    contract = export_checked(model, task, categories, files["fp32"], options).contract
    batches = [letterboxed([image], contract.image_size) for image in calibration_images(options, contract.image_size)]
    graph = equalised(onnx.load(files["fp32"]), batches)
    ranges = calibrate(graph, batches)
    write_quantised(graph, contract, files["int8"], ranges, cpu=cpu_of_this_machine())
    return Graphs(model, task, categories, contract, files, graph, ranges, batches)

"""Whole detectors in ONNX Runtime, timed in turn: what predictions of latency are calibrated by and checked against."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.compression.lowering import lower_model
from norton_deploy.cost.form_tuning import TimingTable, tune_blocks
from norton_deploy.cost.layer_calls import layer_calls
from norton_deploy.export.onnx_export import export_onnx
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.export.static_roi_align import fix_sampling
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.predictor import Image
from norton_deploy.structures import Categories


@dataclass(frozen=True)
class Workload:
    """What every model gets alike: image size, regions through the heads per image, images per call."""

    image_size: tuple[int, int]
    proposals: int
    detections: int
    batch: int = 1

    @classmethod
    def of(cls, detector: Any, image_size: tuple[int, int]) -> "Workload":
        """The detector's own numbers of proposals and detections."""
        return cls(image_size, int(detector.rpn._post_nms_top_n["testing"]), int(detector.roi_heads.detections_per_img))


def time_in_turn(
    predictors: Mapping[str, OnnxRuntimePredictor], images: Sequence[Image], *, rounds: int
) -> dict[str, npt.NDArray[np.float64]]:
    """Times in ms of one image, pixels to detections; [rounds] per model.

    The models are called in turn, in an order that rotates, on the same images.

    Args:
        predictors: name -> exported model.
        images: uint8 RGB [H, W, 3], used in turn.
        rounds: measured calls of each model, after one for warm-up.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in predictors}
    names = list(predictors)
    for step in range(-1, rounds):
        for offset in range(len(names)):
            name = names[(step + offset) % len(names)]
            predictors[name]([images[step % len(images)]])
            if step >= 0:
                times_ms[name].append(predictors[name].timing.total_ms)
    return {name: np.asarray(times) for name, times in times_ms.items()}


def tuned_predictor(
    model: nn.Module, workload: Workload, categories: Categories, table: TimingTable
) -> OnnxRuntimePredictor:
    """A detector in evaluation mode, exported with every CPDBlock in its fastest form and opened."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_tuned(model, workload, categories, table, file)
        return OnnxRuntimePredictor(file, providers=[table.provider])


def export_tuned(
    model: nn.Module, workload: Workload, categories: Categories, table: TimingTable, file: Path
) -> dict[str, str]:
    """Export a detector with every CPDBlock in its fastest form; returns block -> form."""
    calls = layer_calls(model, workload.image_size, proposals=workload.proposals, detections=workload.detections)
    forms = {tuning.name: tuning.form for tuning in tune_blocks(calls, table)}
    assert isinstance(model, GeneralizedRCNN)
    lowered = lower_model(fix_sampling(model), "grouped", forms)
    export_onnx(StaticRCNN(lowered, GraphSettings(workload.image_size, workload.batch)), file, categories=categories)
    return dict(forms)

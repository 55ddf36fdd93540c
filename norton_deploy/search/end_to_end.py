"""Whole detectors in ONNX Runtime: what predictions of latency are calibrated by and checked against."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.compression.channel_groups import is_detector
from norton_deploy.compression.lowering import lower_model
from norton_deploy.cost.complexity import Complexity, count_complexity
from norton_deploy.cost.form_tuning import TimingTable, tune_blocks
from norton_deploy.cost.layer_shapes import LayerCall, layer_calls
from norton_deploy.export.onnx_export import export_onnx
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.export.static_roi_align import fix_sampling
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.structures import Categories


@dataclass(frozen=True)
class Workload:
    """What every model gets alike: image size, regions through the heads per image, images per call."""

    image_size: tuple[int, int]
    proposals: int
    detections: int
    batch: int = 1

    @classmethod
    def of(cls, model: Any, image_size: tuple[int, int]) -> "Workload":
        """A detector's own numbers of proposals and detections; none for a classifier."""
        if not is_detector(model):
            return cls(image_size, 0, 0)
        return cls(image_size, int(model.rpn._post_nms_top_n["testing"]), int(model.roi_heads.detections_per_img))

    def calls(self, model: nn.Module) -> list[LayerCall]:
        """Every call of a layer of the model for one image."""
        return layer_calls(model, self.image_size, proposals=self.proposals, detections=self.detections)

    def complexity(self, model: nn.Module) -> Complexity:
        """MACs of the model for one image, and its parameters."""
        return count_complexity(model, self.image_size, proposals=self.proposals, detections=self.detections)


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
    forms = {tuning.name: tuning.form for tuning in tune_blocks(workload.calls(model), table)}
    assert isinstance(model, GeneralizedRCNN)
    lowered = lower_model(fix_sampling(model), "grouped", forms)
    export_onnx(StaticRCNN(lowered, GraphSettings(workload.image_size, workload.batch)), file, categories=categories)
    return dict(forms)

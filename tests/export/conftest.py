"""Exported graphs of reduced detectors, each made once for all workers."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import FasterRCNN

sys.path.insert(0, str(Path(__file__).parent))

from reduced_detectors import IMAGE_SIZE, compressed_detector, reduced_detector

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.compression.lowering import lower_model
from norton_deploy.export.onnx_export import Precision, export_onnx
from norton_deploy.export.precision import to_fp16
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN, Target
from norton_deploy.structures import Categories, Task

CATEGORIES = Categories((1, 2, 3, 4, 5), (1, 3, 5, 7, 9), ("a", "b", "c", "d", "e"))
Exported = tuple[FasterRCNN, Path]


@pytest.fixture(scope="session")
def of_one_worker(once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str, FasterRCNN], FasterRCNN]:
    """(name, model) -> `model` with the weights that the first worker gave it.

    Weights are computed, and another process may add in another order: a shared graph would not be this model's.
    """

    def load(name: str, model: FasterRCNN) -> FasterRCNN:
        weights = once(f"{name}.pt", lambda path: torch.save(model.state_dict(), path))
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model

    return load


@pytest.fixture(scope="session")
def exported(
    once: Callable[[str, Callable[[Path], None]], Path], of_one_worker: Callable[[str, FasterRCNN], FasterRCNN]
) -> Callable[..., Exported]:
    """(task, target, precision, compressed) -> the detector and its graph (batch 2, 12 unrolled NMS steps)."""

    def make(task: Task, target: Target, precision: Precision = "fp32", compressed: bool = False) -> Exported:
        model = of_one_worker(
            f"{task}_{compressed}", compressed_detector(task) if compressed else reduced_detector(task)
        )

        def export(path: Path) -> None:
            settings = GraphSettings(IMAGE_SIZE, batch=2, target=target, nms_iterations=12)
            graph = StaticRCNN(lower_model(copy.deepcopy(model)), settings)
            if precision == "fp16":
                to_fp16(graph)
            digest = tensors_digest(model.state_dict())
            export_onnx(graph, path, categories=CATEGORIES, precision=precision, weights_sha256=digest)

        return model, once(f"{task}_{target}_{precision}_{compressed}.onnx", export)

    return make

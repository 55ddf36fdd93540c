"""Compress two-stage detectors with NORTON, then train, evaluate, export and run them.

    factors = decompose_filters(conv.weight, rank=1)
    kept = select_filters(pabs_distance(factors), keep=32)
    small = compress(model, CompressionPlan.load("configs/plans/table3.yaml"))

The names below are imported when they are first used, so that a machine that only runs an exported graph
needs neither torch nor torchvision.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from norton_deploy.checkpoints.checkpoint import CheckpointHeader, load_checkpoint, save_checkpoint
    from norton_deploy.compression.compress import build_classifier, build_detector, compress
    from norton_deploy.compression.cpd_block import CPDBlock
    from norton_deploy.cost.complexity import count_complexity
    from norton_deploy.deployment.deploy import deploy
    from norton_deploy.deployment.request import DeployRequest
    from norton_deploy.errors import UserError
    from norton_deploy.inference.loading import load_predictor
    from norton_deploy.method.coupled import CoupledFactors, decompose_coupled
    from norton_deploy.method.cp import CPFactors, decompose_filters
    from norton_deploy.method.filter_selection import pabs_distance, select_filters
    from norton_deploy.method.plan import CompressionPlan
    from norton_deploy.models.detectors import DetectorSettings
    from norton_deploy.structures import Categories, Detections

_HOME = {
    "CPDBlock": "compression.cpd_block",
    "CPFactors": "method.cp",
    "Categories": "structures",
    "CheckpointHeader": "checkpoints.checkpoint",
    "CompressionPlan": "method.plan",
    "CoupledFactors": "method.coupled",
    "DeployRequest": "deployment.request",
    "Detections": "structures",
    "DetectorSettings": "models.detectors",
    "UserError": "errors",
    "build_classifier": "compression.compress",
    "build_detector": "compression.compress",
    "compress": "compression.compress",
    "count_complexity": "cost.complexity",
    "decompose_coupled": "method.coupled",
    "decompose_filters": "method.cp",
    "deploy": "deployment.deploy",
    "load_checkpoint": "checkpoints.checkpoint",
    "load_predictor": "inference.loading",
    "pabs_distance": "method.filter_selection",
    "save_checkpoint": "checkpoints.checkpoint",
    "select_filters": "method.filter_selection",
}

__all__ = [
    "CPDBlock",
    "CPFactors",
    "Categories",
    "CheckpointHeader",
    "CompressionPlan",
    "CoupledFactors",
    "DeployRequest",
    "Detections",
    "DetectorSettings",
    "UserError",
    "build_classifier",
    "build_detector",
    "compress",
    "count_complexity",
    "decompose_coupled",
    "decompose_filters",
    "deploy",
    "load_checkpoint",
    "load_predictor",
    "pabs_distance",
    "save_checkpoint",
    "select_filters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'norton_deploy' has no attribute '{name}'")
    return getattr(import_module(f"norton_deploy.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

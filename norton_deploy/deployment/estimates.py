"""How long each step of a deployment will take on this machine, from one timed call of the dense model."""

import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from norton_deploy.checkpoints.checkpoint import Checkpoint
from norton_deploy.compression.lowering import lower_model
from norton_deploy.data.image_folder import find_images
from norton_deploy.deployment.request import Effort
from norton_deploy.inference.predictor import read_image
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.search.decisions import list_decisions
from norton_deploy.search.plan_search import PlanRequest
from norton_deploy.search.sensitivity import MOST_FORMS
from norton_deploy.structures import TASKS


@dataclass(frozen=True)
class Estimates:
    """Seconds; right to a factor of about two.

    Attributes:
        call_s: of the dense model in eager mode, one image.
        short_side: of its images in pixels.
    """

    call_s: float
    short_side: int

    @classmethod
    def of(cls, dense: Checkpoint, image_size: tuple[int, int], data: Path) -> "Estimates":
        """Time the dense model on one image, the second of two calls."""
        header = dense.header
        task = next(name for name in TASKS if name == header.task)
        predictor = TorchPredictor(lower_model(dense.model), task, header.categories)
        image = read_image(find_images(data / "val2017")[0])
        predictor([image])
        started = time.perf_counter()
        predictor([image])
        return cls(time.perf_counter() - started, min(image_size))

    def evaluate(self, images: int, share: float) -> float:
        """Of a model that takes `share` of the dense one's time, as a graph."""
        return 5 + images * (0.7 * self.call_s * share + 0.05)

    def export(self, images: int, share: float) -> float:
        """Export and comparison on so many images."""
        return 20 + images * 4 * self.call_s * max(share, 0.3)

    def plan(self, dense: nn.Module, request: PlanRequest) -> float:
        """Search of a plan: each single choice is fitted and run, and for times graphs are exported and timed."""
        decisions = list_decisions(dense, forms=request.forms, ranks=request.ranks, multiple=request.multiple)
        fits = sum(len(decision.forms) - 1 for decision in decisions)
        choices = sum(min(len(decision.forms), MOST_FORMS) + len(decision.widths) for decision in decisions)
        scale = min(1.0, request.sensitivity_size / self.short_side) ** 2
        passes = choices * request.images + len(decisions) * request.fit_images
        seconds = 0.5 * fits + passes * (0.02 + 0.15 * self.call_s * scale)
        return seconds + (120 + 8 * request.rounds * self.call_s if request.budget.startswith("speedup") else 5)

    def compress(self, effort: Effort) -> float:
        """Decomposition, and a refit that sees its images some times for each layer."""
        scale = min(1.0, effort.refit_side / self.short_side) ** 2
        return 20 + (60 + 5 * effort.refit_images * self.call_s * scale if effort.refit_images else 0)

    def finetune(self, steps: int, batch_size: int) -> float:
        """Training: the small model forwards and backwards, the dense one forwards."""
        return 20 + steps * batch_size * 3 * self.call_s

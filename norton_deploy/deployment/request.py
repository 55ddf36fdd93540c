"""What to deploy, for what, and with which effort."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from norton_deploy.errors import UserError, require_least
from norton_deploy.export.contract import Precision, Target
from norton_deploy.export.tensorrt_build import Engine, local_capability
from norton_deploy.files import sha256_of
from norton_deploy.inference.predictor import Backend
from norton_deploy.search.decisions import RANKS
from norton_deploy.structures import Task

FINETUNE_STEPS = 2000
CONFIGURATIONS = (".yaml", ".yml")
"""Of Detectron2."""
TARGETS = "onnxruntime, openvino, tensorrt, tensorrt-rtx, tensorrt-rtx:86 (compute capability), torch"


@dataclass(frozen=True)
class EngineTarget:
    """The engine that the artefact is for.

    Attributes:
        name: as the user wrote it.
        backend: what measures speed and AP of graphs on this machine.
        graph: which graph is exported; None for torch.
        engine: what is built from the graph; None where the graph itself is run.
        compute_capability: of the GPU, for an engine.
    """

    name: str
    backend: Backend
    graph: Target | None = "onnxruntime"
    engine: Engine | None = None
    compute_capability: str | None = None

    @property
    def runs_here(self) -> bool:
        """Whether the engine can run on this machine's GPU."""
        here = local_capability()
        return self.engine is not None and here is not None and self.compute_capability in (None, here)

    @classmethod
    def parse(cls, text: str) -> "EngineTarget":
        """
        Raises:
            UserError: an unknown engine.
        """
        name, _, capability = text.partition(":")
        if name in get_args(Engine):
            return cls(text, "onnxruntime", "tensorrt", name, capability or None)  # type: ignore[arg-type]
        if capability or name not in ("onnxruntime", "openvino", "torch"):
            raise UserError(f"--target {text}: expected one of {TARGETS}")
        return cls(text, name, None if name == "torch" else "onnxruntime")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Effort:
    """How much is looked at.

    Attributes:
        images: of val that AP is measured on; None: all.
        refit_images, refit_side: images for the refit, and their short side in pixels at most.
        plan_images, plan_fit_images, plan_side, ranks, multiple: see `PlanRequest`.
        by_time: whether the plan is made for measured time; otherwise for MACs.
        parity_images: images that the graph is compared with the model on.
        rounds: timed calls of each model.
        finetune_steps: steps of training.
    """

    images: int | None
    refit_images: int
    refit_side: int
    plan_images: int
    plan_fit_images: int
    plan_side: int
    ranks: tuple[int, ...]
    multiple: int
    by_time: bool
    parity_images: int
    rounds: int
    finetune_steps: int


@dataclass(frozen=True, kw_only=True)
class DeployRequest:
    """What to deploy, for what, and with which effort."""

    out: Path
    """Folder of the run: models, artefact, report.html. The same line goes on where it was stopped."""
    task: Task | None = None
    """box, mask or keypoint; needed without --model (the packaged detector of that task), checked with it."""
    model: Path | None = None
    """Detector: a checkpoint (.safetensors), torchvision's .pth, or Detectron2's configuration (.yaml, with
    --weights)."""
    data: Path | None = None
    """Folder in COCO-2017's layout; needed with --model, drawn without it."""
    categories: Path | None = None
    """Categories of a .pth or a Detectron2 model: a COCO annotation file or a list of names; by default the data's."""
    speedup: float = 4.0
    """How many times as fast as the dense model the small one shall be."""
    target: str = "onnxruntime"
    """onnxruntime, openvino, tensorrt, tensorrt-rtx, tensorrt-rtx:86 (for compute capability 8.6) or torch."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the images that the engine sees; by default a square of the model's short side."""
    quick: bool = False
    """A first answer in minutes: few images, a plan by MACs instead of time, no fine-tuning."""
    finetune_steps: int | None = None
    """Steps of fine-tuning with the dense model as teacher; 0 leaves it out; by default 2000 (with --quick 0)."""
    plan: Path | None = None
    """Plan (YAML) to use instead of searching one for --speedup."""
    baseline: Path | None = None
    """The dense original of a --model that is compressed already, to compare with."""
    weights: Path | None = None
    """Detectron2's weights, with its configuration in --model."""
    images: int | None = None
    """Measure AP on the first so many images of val; by default all (with --quick 16)."""
    precision: Precision = "fp32"
    """Of the exported graphs, dense and small: fp32, fp16, or int8, calibrated on the training images."""
    batch_size: int = 4
    """Images per step of the fine-tuning."""
    refit_images: int = 32
    """Unlabelled training images on which the compressed layers are refitted (with --quick 8); 0 leaves it out."""
    seed: int = 0
    """Seed of the decompositions and of the fine-tuning."""

    def __post_init__(self) -> None:
        EngineTarget.parse(self.target)
        if self.model is None and self.task is None:
            raise UserError("--model or --task: give a detector, or the task of the packaged one")
        if self.model is not None and self.data is None:
            raise UserError("--data: needed with --model, a folder in COCO-2017's layout")
        if (self.weights is not None) != (self.model is not None and self.model.suffix in CONFIGURATIONS):
            raise UserError("--weights: goes with Detectron2's configuration (.yaml) in --model, and is needed there")
        if self.speedup <= 1:
            raise UserError(f"--speedup: expected more than 1, got {self.speedup:g}")
        require_least(1, images=self.images, batch_size=self.batch_size)
        require_least(0, finetune_steps=self.finetune_steps, refit_images=self.refit_images, seed=self.seed)

    @property
    def effort(self) -> Effort:
        """What --quick and the single settings come to."""
        if self.quick:
            return Effort(self.images or 16, min(self.refit_images, 8), 320, 1, 8, 128, (1,), 32, False, 2, 12,
                          self.finetune_steps or 0)  # fmt: skip
        steps = FINETUNE_STEPS if self.finetune_steps is None else self.finetune_steps
        return Effort(self.images, self.refit_images, 400, 4, 32, 256, RANKS, 16, True, 4, 20, steps)

    def identity(self) -> dict[str, Any]:
        """What the results depend on, as JSON values: files count by their contents."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "out":
                continue
            if name == "data":
                value = None if value is None else value.resolve().name
            elif isinstance(value, Path):
                if not value.is_file():
                    raise UserError(f"--{name} {value}: no such file")
                value = f"{value.name} {sha256_of(value)}"
            values[name] = list(value) if isinstance(value, tuple) else value
        return values

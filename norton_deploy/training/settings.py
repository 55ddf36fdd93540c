"""The settings of every training run, and the optimizer, learning rate, average and processes that they mean."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from norton_deploy.compression.factored_conv import Decomposed
from norton_deploy.errors import UserError, require_least
from norton_deploy.training.run_log import Tracker, check_tracker

MILESTONE_FACTOR = 0.1
# Fields that may differ between a run and its resumption: they change no weight.
_WITHOUT_EFFECT = (
    "resume",
    "overwrite",
    "workers",
    "log_every",
    "state_every",
    "json",
    "progress",
    "tracker",
    "data",
    "out",
    "deterministic",  # only of rounding, as another GPU
)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What a run does with its model: how long, how fast, and what it keeps.

    The learning rate follows the number of images in one step over all processes: it is
    `lr_per_16_images * images / 16`, so that one process with 16 images and eight with 2 train alike;
    `lr`, when it is given, is used as it stands.
    """

    out: Path
    """Folder of the run: checkpoints, state, log."""
    epochs: int | None = None
    """Length of the run in passes over the data (or give steps)."""
    steps: int | None = None
    """Length of the run in optimizer steps (or give epochs)."""
    batch_size: int = 2
    """Images per step and process."""
    workers: int = 4
    """Processes that read data, for each training process."""
    seed: int = 0
    """Seed of everything random: data order, augmentation, sampling, initial weights."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float | None = None
    """Learning rate after warm-up, used as it stands whatever the number of processes."""
    lr_per_16_images: float = 0.02
    """Learning rate for 16 images a step, scaled linearly with the images a step; unless lr is given."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay of matrices and kernels; vectors (biases, normalisation) have none."""
    factor_decay: bool = True
    """Weight decay of the factors of decomposed convolutions too."""
    schedule: Literal["step", "cosine"] = "step"
    """How the learning rate falls: tenfold at each milestone, or along half a cosine to zero."""
    milestones: tuple[float, ...] = (8, 11)
    """Epochs at which the step schedule divides the learning rate by ten."""
    warmup_steps: int = 1000
    """Steps of linear warm-up."""
    warmup_factor: float = 0.001
    """Fraction of the learning rate that warm-up starts from."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; larger ones are scaled down."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision: no (float32), bf16 (a GPU, or a CPU with AMX) or fp16 (a GPU). Evaluation is in float32."""
    cpu_forms: bool = False
    """Train CPDBlocks, and convolutions over small maps, in the forms that are quickest on a CPU: equal to rounding."""
    recompose_blocks: bool = False
    """Train every CPDBlock as one convolution with its recomposed weight, for GPUs: equal to rounding."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU when there is one."""
    deterministic: bool = False
    """On a GPU: only algorithms that give the same bits each time, so that a resumed run is the run that was never
    stopped; slower. A CPU needs no such choice."""
    evaluate_every: int = 1
    """Evaluate after every so many epochs; 0: only at the end."""
    state_every: int = 500
    """Save the state that --resume continues from after every so many steps (and after every epoch)."""
    log_every: int = 20
    """Write a log line after every so many steps."""
    tracker: Tracker = "tensorboard"
    """What gets the numbers of log.jsonl too: tensorboard (events in --out), wandb, mlflow or trackio."""
    resume: bool = False
    """Continue the run in --out exactly where its state was saved."""
    overwrite: bool = False
    """Delete the run that is in --out and start anew."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            raise UserError("epochs, steps: give one of the two")
        if self.epochs is not None and self.steps is not None:
            raise UserError(
                f"epochs, steps: are {self.epochs} and {self.steps}, give one of the two; "
                "--epochs None or --steps None takes back what a --config file sets"
            )
        for least, names in (
            (1, ("epochs", "steps", "batch_size", "state_every", "log_every")),
            (0, ("workers", "warmup_steps", "evaluate_every", "weight_decay", "seed")),
        ):
            require_least(least, **{name: getattr(self, name) for name in names})
        for name in ("lr", "lr_per_16_images", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}: expected a positive number, got {value}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum: expected 0 or more and less than 1, got {self.momentum}")
        if not 0 <= self.warmup_factor <= 1:
            raise UserError(f"warmup_factor: expected 0 to 1, got {self.warmup_factor}")
        check_tracker(self.tracker)
        for first, second in (("resume", "overwrite"), ("cpu_forms", "recompose_blocks")):
            if getattr(self, first) and getattr(self, second):
                raise UserError(f"{first}, {second}: give at most one of the two")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def peak_lr(self, images_per_step: int) -> float:
        """The learning rate after warm-up for so many images a step, over all processes."""
        return self.lr if self.lr is not None else self.lr_per_16_images * images_per_step / 16

    def learning_rate(self, step: int, *, peak: float, total_steps: int, steps_per_epoch: int) -> float:
        """Learning rate of one step: linear warm-up times a step or cosine schedule.

        A function of the step alone, so that a resumed run needs no scheduler state.

        Args:
            step: 0 for the first step.
            peak: learning rate after warm-up.
            total_steps: steps of the whole run; the cosine reaches zero there.
            steps_per_epoch: steps in one pass over the data.
        """
        warmup = 1.0
        if step < self.warmup_steps:
            warmup = self.warmup_factor + (1 - self.warmup_factor) * (step / self.warmup_steps)
        if self.schedule == "cosine":
            length = max(1, total_steps - self.warmup_steps)
            position = min(1.0, max(0, step - self.warmup_steps) / length)
            return peak * warmup * 0.5 * (1 + math.cos(math.pi * position))
        passed = sum(step >= round(milestone * steps_per_epoch) for milestone in self.milestones)
        return peak * warmup * MILESTONE_FACTOR**passed

    def identity(self) -> dict[str, Any]:
        """The fields that decide the weights, as plain JSON values: a resumed run must have the same."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))  # tuples as lists, paths as texts
        return {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}


def parameter_groups(model: nn.Module, weight_decay: float, *, factor_decay: bool = True) -> list[dict]:
    """Trained parameters in two groups: matrices and kernels with weight decay, vectors without.

    Vectors are biases and the affine terms of normalisation layers: pulling them towards zero removes scale
    that the next layer then has to learn again. Without `factor_decay` factors have none either: decay on each of
    three shrinks their product, the filter, three times as fast, and a filter that a BatchNorm follows to nothing.
    """
    factored = [layer for layer in model.modules() if isinstance(layer, Decomposed)]
    spared = set() if factor_decay else {id(factor) for layer in factored for factor in layer.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1 and id(parameter) not in spared]
    kept = {id(parameter) for parameter in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if id(parameter) not in kept], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over `parameter_groups`; the trainer sets the learning rate at every step.

    Raises:
        UserError: no parameter of the model is trained.
    """
    groups = parameter_groups(model, settings.weight_decay, factor_decay=settings.factor_decay)
    if not any(group["params"] for group in groups):
        raise UserError("the model has no trainable parameter; raise detector.backbone.trainable_layers")
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, fused=True)


def build_accelerator(settings: TrainingSettings) -> Accelerator:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs), or stand alone.

    Raises:
        UserError: fp16 was asked for and there is no GPU.
    """
    use_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.precision == "fp16" and use_cpu:
        raise UserError("precision fp16 needs a GPU; use --precision no (or bf16) on a CPU")
    if settings.deterministic and not use_cpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
        torch.use_deterministic_algorithms(True)  # an operator that has no such algorithm says so
    return Accelerator(mixed_precision=settings.precision, cpu=use_cpu, step_scheduler_with_optimizer=False)

"""Optimizer, parameter groups and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from norton_deploy.errors import UserError
from norton_deploy.training.settings import TrainingSettings

MILESTONE_FACTOR = 0.1


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in two groups: matrices and kernels with weight decay, vectors without.

    Vectors are biases and the affine terms of normalisation layers: pulling them towards zero removes scale
    that the next layer then has to learn again.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over `parameter_groups`; the trainer sets the learning rate at every step.

    Raises:
        UserError: no parameter of the model is trained.
    """
    groups = parameter_groups(model, settings.weight_decay)
    if not any(group["params"] for group in groups):
        raise UserError("the model has no trainable parameter; raise detector.backbone.trainable_layers")
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, fused=True)


def learning_rate(
    step: int, *, settings: TrainingSettings, peak: float, total_steps: int, steps_per_epoch: int
) -> float:
    """Learning rate of one step: linear warm-up times a step or cosine schedule.

    A function of the step alone, so that a resumed run needs no scheduler state.

    Args:
        step: 0 for the first step.
        settings: `schedule`, `milestones` (epochs), `warmup_steps`, `warmup_factor`.
        peak: learning rate after warm-up.
        total_steps: steps of the whole run; the cosine reaches zero there.
        steps_per_epoch: steps in one pass over the data.
    """
    warmup = 1.0
    if step < settings.warmup_steps:
        progress = step / settings.warmup_steps
        warmup = settings.warmup_factor + (1 - settings.warmup_factor) * progress
    if settings.schedule == "cosine":
        length = max(1, total_steps - settings.warmup_steps)
        position = min(1.0, max(0, step - settings.warmup_steps) / length)
        return peak * warmup * 0.5 * (1 + math.cos(math.pi * position))
    passed = sum(step >= round(milestone * steps_per_epoch) for milestone in settings.milestones)
    return peak * warmup * MILESTONE_FACTOR**passed

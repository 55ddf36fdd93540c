import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.errors import UserError
from norton_deploy.training import settings as settings_module
from norton_deploy.training.settings import (
    TrainingSettings,
    build_accelerator,
    build_optimizer,
    parameter_groups,
)


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(out=Path("run"), **{"epochs": 12, **changes})


def rate(step: int, s: TrainingSettings, total: int = 1200, per_epoch: int = 100) -> float:
    return s.learning_rate(step, peak=0.02, total_steps=total, steps_per_epoch=per_epoch)


def test_step_schedule_with_warm_up():
    s = settings(warmup_steps=100)
    assert rate(0, s) == pytest.approx(0.02 * 0.001)
    assert rate(50, s) == pytest.approx(0.02 * (0.001 + 0.999 / 2))
    assert rate(100, s) == rate(799, s) == pytest.approx(0.02)
    assert rate(800, s) == rate(1099, s) == pytest.approx(0.002)
    assert rate(1100, s) == rate(1199, s) == pytest.approx(0.0002)


def test_cosine_schedule_starts_after_warm_up_and_ends_at_zero():
    s = settings(schedule="cosine", warmup_steps=200)
    assert rate(200, s) == pytest.approx(0.02)
    assert rate(450, s) == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(700, s) == pytest.approx(0.01)
    assert rate(1200, s) == pytest.approx(0.0, abs=1e-12)


def test_learning_rate_follows_the_images_a_step():
    assert settings().peak_lr(16) == 0.02
    assert settings().peak_lr(4) == pytest.approx(0.005)
    assert settings(lr=0.3).peak_lr(4) == 0.3


def test_vectors_have_no_weight_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[3].weight.requires_grad_(False)
    kernels, vectors = parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in kernels["params"]] == [(4, 3, 3, 3)]
    assert [tuple(p.shape) for p in vectors["params"]] == [(4,), (4,), (4,), (2,)]
    assert (kernels["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


def test_factors_can_be_spared_weight_decay():
    dense = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))
    model = nn.Sequential(CPDBlock.shaped_like(dense[0], 4, 6, 1), *dense[1:])
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [4, 4]
    decayed, spared = parameter_groups(model, 0.1, factor_decay=False)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 6, 3, 3)]
    assert {id(p) for p in spared["params"]} >= {id(p) for p in model[0].parameters()} and spared["weight_decay"] == 0


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers(name, kind):
    assert type(build_optimizer(nn.Linear(2, 2), settings(optimizer=name))) is kind


def test_a_frozen_model_cannot_be_trained():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(model, settings())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"epochs": None}, "epochs, steps"),
        ({"steps": 5}, "epochs, steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"lr": -0.1}, "lr"),
        ({"momentum": -1.0}, "momentum"),
        ({"warmup_factor": -2.0}, "warmup_factor"),
        ({"seed": -1}, "--seed"),
        ({"resume": True, "overwrite": True}, "resume, overwrite"),
    ],
)
def test_impossible_settings_are_named(changes, field):
    with pytest.raises(UserError, match=f"^{field}: "):
        settings(**changes)


def test_deterministic_algorithms_are_for_gpus(monkeypatch, tmp_path):
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(settings_module, "Accelerator", lambda **options: options)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wanted = TrainingSettings(out=tmp_path, steps=1, deterministic=True)
    assert build_accelerator(replace(wanted, device="cpu"))["cpu"] and not asked
    assert not build_accelerator(TrainingSettings(out=tmp_path, steps=1))["cpu"] and not asked
    assert not build_accelerator(wanted)["cpu"] and asked == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert wanted.identity() == TrainingSettings(out=tmp_path, steps=1).identity()

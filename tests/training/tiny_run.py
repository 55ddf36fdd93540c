"""A tiny training run for the tests: a small CNN with dropout on random images."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from norton_deploy.training.batches import Batch
from norton_deploy.training.run_folder import RunFolder
from norton_deploy.training.settings import TrainingSettings, build_accelerator
from norton_deploy.training.trainer import Evaluation, Trainer

IMAGES = 24


class RandomImages:
    """24 fixed random images in an order that depends on the epoch, shared out to the processes in turn."""

    def __init__(self, batch_size: int, rank: int, processes: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(IMAGES, 3, 8, 8, generator=generator)
        self.labels = torch.randint(0, 4, (IMAGES,), generator=generator)
        self.batch_size, self.rank, self.processes = batch_size, rank, processes

    def __len__(self) -> int:
        return IMAGES // (self.batch_size * self.processes)

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
        for index in range(first_batch, len(self)):
            start = (index * self.processes + self.rank) * self.batch_size
            chosen = order[start : start + self.batch_size]
            yield Batch(self.images[chosen], self.labels[chosen], chosen.tolist())


def tiny_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8 * 64, 4),
    )


def cross_entropy(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    return {"classification": functional.cross_entropy(model(batch.images), batch.targets)}


def tiny_trainer(
    settings: TrainingSettings,
    *,
    model: nn.Module | None = None,
    loss_terms: Callable[[nn.Module, Batch], dict[str, torch.Tensor]] = cross_entropy,
    evaluate: Callable[[nn.Module], Evaluation] | None = None,
) -> Trainer:
    accelerator = build_accelerator(settings)
    if accelerator.is_main_process:
        RunFolder(settings.out).claim(settings.identity(), resume=settings.resume, overwrite=settings.overwrite)
    accelerator.wait_for_everyone()

    def score(trained: nn.Module) -> Evaluation:
        torch.rand(7)  # an evaluation may draw random numbers; the next step must not notice
        total = sum(float(parameter.abs().sum()) for parameter in trained.parameters())
        return Evaluation({"weights": {"sum": total}}, -total)

    return Trainer(
        accelerator=accelerator,
        model=tiny_model() if model is None else model,
        loss_terms=loss_terms,
        loader=RandomImages(settings.batch_size, accelerator.process_index, accelerator.num_processes),
        settings=settings,
        evaluate=evaluate or score,
        save_model=lambda path, trained: torch.save(trained.state_dict(), path),
        identity=settings.identity(),
    )


def tiny_settings(out: Path, **changes: Any) -> TrainingSettings:
    defaults: dict[str, Any] = {
        "steps": 15,
        "batch_size": 4,
        "lr": 0.05,
        "warmup_steps": 3,
        "state_every": 4,
        "log_every": 1,
        "progress": False,
        "device": "cpu",
        "clip_norm": 1.0,
    }
    return TrainingSettings(out=out, **{**defaults, **changes})

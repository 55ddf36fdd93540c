"""Images a second of the two loaders of a classifier: kept in memory and augmented in batches, or read one by one.

Both make the same batches of the same crops' distribution (shifted by up to 4 px, mirrored), in turn, in one process
without workers; a round is one batch of each. On a GPU the images in memory are the GPU's, the others cross to it.

    python benchmarks/loading.py --data runs/cifar
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from benchmarks.lib.cells import RESULTS, ResultCells, interval, run, tabulate
from benchmarks.lib.cifar_experiment import IMAGE_SIZE, MEAN, STD
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.data.classification import ClassificationFolder, list_class_files
from norton_deploy.data.resident_images import read_resident_images
from norton_deploy.training.batches import (
    Batch,
    EpochLoader,
    GroupedBatchSampler,
    ResidentBatches,
    SampledBatches,
    collate_classes,
)
from norton_deploy.training.settings import TrainingSettings, build_accelerator

RESIDENT, READ = "in memory", "read one by one"


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/loading.py."""

    data: Path
    """Folder with train/CLASS/* of 32 px images."""
    batch_size: int = 128
    """Images in a batch."""
    rounds: int = 60
    """Batches of each."""
    out: Path = RESULTS / "loading.json"
    """Results file; a Markdown table is written beside it."""


def main(settings: Settings) -> int:
    """Measure on the GPU if there is one, otherwise on the CPU."""
    key = {"batch_size": settings.batch_size, "rounds": settings.rounds}
    name = "cuda" if torch.cuda.is_available() else "cpu"
    return ResultCells(settings.out, key, report).measure_all({name: partial(measure, settings)})


def measure(settings: Settings) -> dict[str, Any]:
    """Both loaders in turn."""
    training = TrainingSettings(out=Path("unused"), steps=1, batch_size=settings.batch_size, workers=0)
    accelerator = build_accelerator(training)
    images = read_resident_images(settings.data, "train", image_size=IMAGE_SIZE, mean=MEAN, std=STD)
    crop = v2.RandomCrop(list(IMAGE_SIZE), padding=4, padding_mode="reflect")
    convert = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *convert])
    files = ClassificationFolder(list_class_files(settings.data, "train"), transform)
    sampler = GroupedBatchSampler.of(len(files), training, accelerator)
    batches = {
        RESIDENT: _endless(ResidentBatches(images.to(accelerator.device), training, accelerator)),
        READ: _endless(SampledBatches(files, sampler, collate_classes, training.workers)),
    }

    def draw(name: str, _step: int) -> None:
        next(batches[name]).to(accelerator.device)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    turns = time_in_turns({name: partial(draw, name) for name in batches}, rounds=settings.rounds, warm_up=3)
    rate = {name: settings.batch_size / turns.summary(name).p50_ms * 1000 for name in batches}
    return {"images": len(images), "images_per_s": rate, "speedup": turns.speedup(READ, RESIDENT).to_dict()}


def _endless(loader: EpochLoader) -> Iterator[Batch]:
    return itertools.chain.from_iterable(loader.batches(epoch, 0) for epoch in itertools.count())


def report(results: ResultCells) -> str:
    """A row per device."""
    return tabulate(
        f"Images a second (median), batches of {results.settings['batch_size']}, one process",
        results.cells.items(),
        {
            "Device": lambda row: row[0],
            RESIDENT: lambda row: f"{row[1]['images_per_s'][RESIDENT]:,.0f}",
            READ: lambda row: f"{row[1]['images_per_s'][READ]:,.0f}",
            "Ratio": lambda row: interval(row[1]["speedup"]),
        },
    ).to_markdown()


if __name__ == "__main__":
    run(Settings, main)

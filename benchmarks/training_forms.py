"""Forms in which layers train on a CPU: what `training/forms.py` puts in their place, against the plain ones.

Blocks: the paper's three convolutions against one with the recomposed weight, for layers of VGG-16 on CIFAR-10 and of
a ResNet-50 on 192 px images, at several ranks, in float32 and in bfloat16. Convolutions: oneDNN's against one matrix
product in bfloat16, for 3 x 3 convolutions over small maps and for the whole VGG-16; the product is timed on an 8 x 8
map too, where training does not use it. Forward and backward, the two forms in turn.

    python benchmarks/training_forms.py
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.cells import RESULTS, ResultCells, interval, page, run, tabulate
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.training import forms as training_forms

PRECISIONS = {"float32": False, "bfloat16": True}  # whether autocast is on
BLOCKS = ((64, 32, 128), (256, 8, 128), (512, 4, 128), (64, 48, 4), (256, 12, 4))  # channels, side of the map, images
CONVOLUTIONS = ((256, 8), (512, 4), (512, 2))  # channels, side of the map
IMAGES = 128
VGG = ClassifierSettings("vgg16_bn", 10, image_size=(32, 32))


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/training_forms.py."""

    out: Path = RESULTS / "training_forms.json"
    """Results file; Markdown tables are written beside it."""
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Ranks of the blocks."""
    repeats: int = 9
    """Timed runs of each form."""
    threads: int = 1
    """Threads of both."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    torch.set_num_threads(settings.threads)
    cells: dict[str, Callable[[], dict[str, Any]]] = {}
    for precision in PRECISIONS:
        for layer in BLOCKS:
            for rank in settings.ranks:
                name = "block, {0} -> {0}, {1} x {1}, {2} images".format(*layer)
                measure = partial(measure_block, layer, rank, precision, settings.repeats)
                cells[f"{name}, rank {rank}, {precision}"] = measure
    for channels, side in CONVOLUTIONS:
        measure = partial(measure_convolution, channels, side, settings.repeats)
        cells[f"convolutions, {channels} -> {channels}, {side} x {side}"] = measure
    cells["convolutions, all of VGG-16-BN, 32 x 32"] = partial(measure_vgg, settings.repeats)
    return ResultCells(settings.out, {"threads": settings.threads}, report).measure_all(cells)


def measure_block(layer: tuple[int, int, int], rank: int, precision: str, repeats: int) -> dict[str, Any]:
    """One block at one rank and precision."""
    channels, side, images = layer
    torch.manual_seed(0)
    block = CPDBlock(channels, channels, 3, rank, padding=1, bias=False).to(memory_format=torch.channels_last)
    forms = {"three": block, "one": training_forms.RecomposedBlock.sharing(block)}
    x = torch.randn(images, channels, side, side)
    with torch.autocast("cpu", torch.bfloat16, enabled=PRECISIONS[precision]):
        takes_one = training_forms.CpuBlock.sharing(block).trains_as_one(x)
    return {
        "precision": precision, "channels": channels, "side": side, "images": images, "rank": rank,
        **time_steps(forms, x, repeats, PRECISIONS[precision]),
        "block_takes": "one" if takes_one else "three",
    }  # fmt: skip


def measure_convolution(channels: int, side: int, repeats: int) -> dict[str, Any]:
    """One convolution, and the product in its place whatever the map."""
    used, training_forms.LARGEST_MAP = training_forms.LARGEST_MAP, max(training_forms.LARGEST_MAP, side**2)
    try:
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return {"used": side**2 <= used, **measure_products(layer, torch.randn(IMAGES, channels, side, side), repeats)}
    finally:
        training_forms.LARGEST_MAP = used


def measure_vgg(repeats: int) -> dict[str, Any]:
    """The whole network."""
    images = torch.randn(IMAGES, 3, *VGG.image_size)
    return {"used": True, **measure_products(VGG.build(), images, repeats)}


def measure_products(model: nn.Module, images: Tensor, repeats: int) -> dict[str, Any]:
    """A model with convolutions, and with products in their place."""
    model = model.to(memory_format=torch.channels_last)
    forms = {"convolution": model, "product": training_forms.use_cpu_forms(nn.Sequential(copy.deepcopy(model)))}
    return time_steps(forms, images, repeats, bfloat16=True)


def time_steps(forms: Mapping[str, nn.Module], images: Tensor, repeats: int, bfloat16: bool) -> dict[str, Any]:
    """Forward and backward of two forms in turn."""
    images = images.to(memory_format=torch.channels_last).requires_grad_()

    def step(model: nn.Module, _: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = model(images)
        torch.autograd.grad(output, [images, *model.parameters()], torch.ones_like(output))

    turns = time_in_turns({name: partial(step, form.train()) for name, form in forms.items()}, rounds=repeats)
    return {"times_ms": turns.to_dict(), "speedup": turns.speedup(*forms).to_dict()}


def report(results: ResultCells) -> str:
    """One row a block and rank; one a convolution."""
    blocks = [cell for name, cell in results.cells.items() if name.startswith("block")]
    plain = {name.partition(", ")[2]: cell for name, cell in results.cells.items() if name.startswith("convolutions")}

    def ms(form: str) -> Callable[[dict[str, Any]], str]:
        return lambda cell: f"{median(cell['times_ms'][form]):.1f}"

    threads = f"on {results.settings['threads']} thread(s), medians; paired ratio, 95 % interval"
    return page(
        tabulate(
            f"Forward and backward {threads}",
            blocks,
            {
                "3x3 layer": lambda cell: "{channels} -> {channels}, {side} x {side}, {images} images".format(**cell),
                "Rank": lambda cell: str(cell["rank"]),
                "Precision": lambda cell: cell["precision"],
                "Three convolutions (ms)": ms("three"),
                "One (ms)": ms("one"),
                "Three / one": lambda cell: interval(cell["speedup"]),
                "CPU forms take": lambda cell: cell["block_takes"],
            },
        ),
        tabulate(
            f"Forward and backward of {IMAGES} images in bfloat16 {threads}",
            plain.items(),
            {
                "3x3 layer": lambda row: row[0],
                "Convolution (ms)": lambda row: ms("convolution")(row[1]),
                "Product (ms)": lambda row: ms("product")(row[1]),
                "Convolution / product": lambda row: interval(row[1]["speedup"]),
                "CPU forms use the product": lambda row: "yes" if row[1]["used"] else "no",
            },
        ),
    )


if __name__ == "__main__":
    run(Settings, main)

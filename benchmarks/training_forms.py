"""CPDBlock in training: the paper's three convolutions against one with the recomposed weight.

Both compute the same function of the same factors; with `cpu_forms` a block takes the second where
`CpuBlock.trains_as_one` expects it to be quicker. Here both are timed, forward and backward, in alternation, for
layers of VGG-16 on CIFAR-10 and of a ResNet-50 on 192 px images, at several ranks, in float32 and in bfloat16.

    python benchmarks/training_forms.py
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.config import parse_settings
from norton_deploy.files import atomic_write
from norton_deploy.reporting.latency import paired_speedup, summary_to_dict
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.training.forms import CpuBlock, convolve

RESULTS = Path(__file__).parent / "results"
# Channels, height and width of the maps, images in a batch.
PRECISIONS = {"float32": False, "bfloat16": True}  # whether autocast is on
LAYERS = ((64, 32, 128), (256, 8, 128), (512, 4, 128), (64, 48, 4), (256, 12, 4))


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/training_forms.py."""

    out: Path = RESULTS / "training_forms.json"
    """Results file; a Markdown table is written beside it."""
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Ranks of the blocks."""
    repeats: int = 9
    """Timed runs of each form."""
    threads: int = 1
    """Threads of both."""


def main() -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, prog="training_forms", description=__doc__ or "")
    torch.set_num_threads(settings.threads)
    layers = [
        measure(layer, rank, precision, settings.repeats)
        for precision in PRECISIONS
        for layer in LAYERS
        for rank in settings.ranks
    ]
    result = {
        "provenance": provenance(),
        "settings": asdict(settings) | {"out": settings.out.name},
        "layers": layers,
    }
    with atomic_write(settings.out, "w") as stream:
        json.dump(result, stream, indent=1)
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write(table(layers, settings.threads).to_markdown() + "\n")
    return 0


def measure(layer: tuple[int, int, int], rank: int, precision: str, repeats: int) -> dict[str, Any]:
    """Times of one layer at one rank and precision."""
    channels, side, images = layer
    torch.manual_seed(0)
    block = CPDBlock(channels, channels, 3, rank, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(images, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
    times_ms: dict[str, list[float]] = {"three": [], "one": []}
    with torch.autocast("cpu", torch.bfloat16, enabled=PRECISIONS[precision]):
        takes_one = CpuBlock.sharing(block).trains_as_one(x)
        for _ in range(repeats + 2):
            for form in times_ms:
                started = time.perf_counter()
                step(block, x, form)
                times_ms[form].append((time.perf_counter() - started) * 1e3)
    measured = {form: values[2:] for form, values in times_ms.items()}
    return {
        "precision": precision,
        "channels": channels,
        "side": side,
        "images": images,
        "rank": rank,
        "times_ms": measured,
        "speedup": summary_to_dict(paired_speedup(measured["three"], measured["one"])),
        "block_takes": "one" if takes_one else "three",
    }


def step(block: CPDBlock, x: Tensor, form: str) -> None:
    """Forward and backward in a form."""
    if form == "three":
        y = block(x)
    else:
        y = convolve(x, block.dense_weight(), None, block.stride, block.padding, block.dilation)
    torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))


def table(layers: list[dict[str, Any]], threads: int) -> Table:
    """One row a layer and rank."""
    rows = tuple(
        (
            f"{entry['channels']} -> {entry['channels']}, {entry['side']} x {entry['side']}, {entry['images']} images",
            str(entry["rank"]),
            entry["precision"],
            f"{median(entry['times_ms']['three']):.1f}",
            f"{median(entry['times_ms']['one']):.1f}",
            "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**entry["speedup"]),
            entry["block_takes"],
        )
        for entry in layers
    )
    header = ("3x3 layer", "Rank", "Precision", "Three convolutions (ms)", "One (ms)", "Three / one", "The block takes")
    return Table(header, rows, f"Forward and backward on {threads} thread(s), medians; paired ratio, 95 % interval")


if __name__ == "__main__":
    sys.exit(main())

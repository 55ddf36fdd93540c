"""Training over small maps on a CPU: oneDNN's bfloat16 convolution against one matrix product (`SmallMapConv2d`).

Forward and backward under autocast, in alternation, for 3 x 3 convolutions of VGG-16 on CIFAR-10 and for the whole
VGG-16. The product is timed on an 8 x 8 map too, where training does not use it: the convolution is quicker there.

    python benchmarks/small_maps.py
"""

import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from norton_deploy.config import parse_settings
from norton_deploy.files import atomic_write
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.reporting.latency import paired_speedup, summary_to_dict
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.training import forms

RESULTS = Path(__file__).parent / "results"
LAYERS = ((256, 8), (512, 4), (512, 2))  # channels, height and width of the map
VGG = ClassifierSettings("vgg16_bn", 10, image_size=(32, 32))


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/small_maps.py."""

    out: Path = RESULTS / "small_maps.json"
    """Results file; a Markdown table is written beside it."""
    images: int = 128
    """Images in a batch."""
    repeats: int = 9
    """Timed runs of each form."""
    threads: int = 1
    """Threads of both."""


def main() -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, prog="small_maps", description=__doc__ or "")
    torch.set_num_threads(settings.threads)
    threshold = forms.LARGEST_MAP
    entries = []
    for channels, side in LAYERS:
        forms.LARGEST_MAP = max(threshold, side**2)  # so that the product is taken whatever the map
        images = torch.randn(settings.images, channels, side, side)
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        name = f"{channels} -> {channels}, {side} x {side}"
        entries.append({"name": name, "used": side**2 <= threshold, **measure(layer, images, settings.repeats)})
    forms.LARGEST_MAP = threshold
    images = torch.randn(settings.images, 3, *VGG.image_size)
    whole = measure(VGG.build(), images, settings.repeats)
    entries.append({"name": "all of VGG-16-BN, 32 x 32", "used": True, **whole})
    given = asdict(settings) | {"out": settings.out.name}
    result = {"provenance": provenance(), "settings": given, "layers": entries}
    with atomic_write(settings.out, "w") as stream:
        json.dump(result, stream, indent=1)
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write(table(entries, settings).to_markdown() + "\n")
    return 0


def measure(model: nn.Module, images: Tensor, repeats: int) -> dict[str, Any]:
    """Times of a model's step with convolutions, and with products in their place."""
    model = model.train().to(memory_format=torch.channels_last)
    [products] = forms.use_cpu_forms(nn.Sequential(copy.deepcopy(model)))
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    models = {"convolution": model, "product": products}
    times_ms: dict[str, list[float]] = {form: [] for form in models}
    for _ in range(repeats + 1):
        for form, timed in models.items():
            started = time.perf_counter()
            step(timed, images)
            times_ms[form].append((time.perf_counter() - started) * 1e3)
    measured = {form: values[1:] for form, values in times_ms.items()}  # the first warms up
    speedup = paired_speedup(measured["convolution"], measured["product"])
    return {"times_ms": measured, "speedup": summary_to_dict(speedup)}


def step(model: nn.Module, images: Tensor) -> None:
    """Forward and backward."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    torch.autograd.grad(output, [images, *model.parameters()], torch.ones_like(output))


def table(entries: list[dict[str, Any]], settings: Settings) -> Table:
    """One row a layer, and the whole network."""
    rows = tuple(
        (
            entry["name"],
            *(f"{median(entry['times_ms'][form]):.1f}" for form in ("convolution", "product")),
            "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**entry["speedup"]),
            "yes" if entry["used"] else "no",
        )
        for entry in entries
    )
    header = ("3x3 layer", "Convolution (ms)", "Product (ms)", "Convolution / product", "Training uses the product")
    caption = (
        f"Forward and backward of {settings.images} images in bfloat16 on {settings.threads} thread(s), medians; "
        "paired ratio, 95 % interval"
    )
    return Table(header, rows, caption)


if __name__ == "__main__":
    sys.exit(main())

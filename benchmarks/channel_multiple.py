"""What rounding the kept filters is worth: Table III's plan with odd numbers, multiples of 8, 16 and 32.

The plan's rates stay; each number of kept filters becomes the odd number or the multiple next to it, so MACs differ
by what rounding does to them and stand beside the times. Timed in ONNX Runtime are the compressed ResNet-50 body and
the whole Faster R-CNN, the variants in turn, each with its CPDBlocks in the forms that were measured fastest on this
machine. Weights are random, normalisation calibrated on the images: nothing is said about AP. A finished cell (body,
detector) is written at once; running again does only what is missing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, page, run, settings_of, tabulate
from benchmarks.lib.random_detectors import WorkSettings, timing_table
from norton_deploy.compression.channel_groups import channel_groups, output_width
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.compression.lowering import lower_model
from norton_deploy.cost.complexity import layer_calls
from norton_deploy.cost.session import make_session
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.data.image_file import read_image
from norton_deploy.export.onnx_export import OPSET
from norton_deploy.export.static_roi_align import fix_sampling
from norton_deploy.inference.predictor import Image, Predictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.report import Table
from norton_deploy.search.form_tuning import TimingTable, tune_blocks
from norton_deploy.search.latency_budget import Workload, tuned_predictor
from norton_deploy.structures import Categories

CAPTIONS = {"body": "ResNet-50 body", "detector": "Whole Faster R-CNN, pixels to detections"}
Models = tuple[dict[str, nn.Module], Categories]


@dataclass(frozen=True, kw_only=True)
class Settings(WorkSettings):
    """Settings of benchmarks/channel_multiple.py."""

    multiples: tuple[int, ...] = (1, 8, 16, 32)
    """Kept filters are the next multiple of these; 1 stands for the next odd number. The first is the baseline."""
    plan: Path = PLANS / "table3.yaml"
    """Plan whose numbers are rounded."""
    rounds: int = 8
    """Measured calls of each variant."""
    out: Path = RESULTS / "channel_multiple.json"
    """Results; a .md is written beside it."""
    work: Path = Path("runs/channel_multiple")
    """Folder for prepared images and layer times."""


def main(settings: Settings) -> int:
    """Measure what is missing and write the results."""
    images = cache(partial(settings.prepare_images, settings.work))
    models = cache(lambda: build_models(settings, images()[0]))
    cells = {name: lambda name=name: measure(name, models(), *images(), settings) for name in CAPTIONS}
    return ResultCells(settings.out, settings_of(settings), report).measure_all(cells)


def round_kept(count: int, width: int, multiple: int) -> int:
    """The multiple next to `count`, between one multiple and the width; for 1 the odd number not below it."""
    if multiple == 1:
        return min(count | 1, width)
    return min(max(multiple, round(count / multiple) * multiple), width)


def build_models(settings: Settings, images: Sequence[Path]) -> Models:
    """One seeded dense detector, compressed by the plan with each rounding; and its categories."""
    dense, categories = settings.random_detector("box", images)
    plan = fit_plan(dense, CompressionPlan.load(settings.plan))
    widths = {
        name: output_width(dense.get_submodule(group.producers[0])) for name, group in channel_groups(dense).items()
    }
    models = {}
    for multiple in settings.multiples:
        keep = {name: round_kept(count, widths[name], multiple) for name, count in plan.keep.items()}
        name = "odd numbers" if multiple == 1 else f"multiples of {multiple}"
        models[name] = settings.compressed(dense, CompressionPlan(plan.architecture, plan.ranks, keep), images)
    return models, categories


def measure(cell: str, models: Models, images: Sequence[Path], images_are: str, settings: Settings) -> dict[str, Any]:
    """Times of all variants in turn, MACs and parameters."""
    pixels = [read_image(path) for path in images]
    table = timing_table(settings.work)
    calls: dict[str, Callable[[int], object]] = {}
    complexity = {}
    for name, model in models[0].items():
        print(f"{cell}: exporting {name}", file=sys.stderr)
        if cell == "body":
            calls[name] = body_call(model, settings.workload, table)
        else:
            predictor = tuned_predictor(model, settings.workload, models[1], table, pixels)
            calls[name] = partial(call_detector, predictor, pixels)
        layers = [
            layer
            for layer in settings.complexity(model).layers
            if cell == "detector" or layer.name.startswith("backbone.body.")
        ]
        complexity[name] = {"macs": sum(layer.macs for layer in layers), "params": sum(one.params for one in layers)}
    turns = time_in_turns(calls, rounds=settings.rounds, warm_up=1)
    return {"images": images_are, "complexity": complexity, "times_ms": turns.to_dict()}


def call_detector(predictor: Predictor, pixels: Sequence[Image], step: int) -> object:
    """The whole detector on one image after the other."""
    return predictor([pixels[step % len(pixels)]])


def body_call(model: nn.Module, work: Workload, table: TimingTable) -> Callable[[int], object]:
    """The compressed body alone, image in and four feature maps out, as a call of an ONNX Runtime session."""
    layers = layer_calls(model, work.image_size, proposals=work.proposals, detections=work.detections)
    forms = {tuning.name: tuning.form for tuning in tune_blocks(layers, table)}
    body = lower_model(fix_sampling(cast(Any, model)), "grouped", forms).backbone.body
    example = torch.zeros(1, 3, *work.image_size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.onnx.export(
            Stages(body).eval(), (example,), input_names=["images"], opset_version=OPSET, dynamo=True, optimize=False,
            verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(file := Path(folder) / "body.onnx")
        session = make_session(file, "cpu")
    image = np.random.default_rng(0).standard_normal(tuple(example.shape), np.float32)
    return lambda _: session.run(None, {"images": image})


class Stages(nn.Module):
    """The body with a tuple of its four maps for an output, which the exporter can name."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B, 3, H, W] -> the maps of stages 1 to 4."""
        return tuple(self.body(images).values())


def report(results: ResultCells) -> str:
    """What was run, a table a cell, and which rounding is the quickest."""
    settings, cells = results.settings, results.cells
    height, width = settings["image_size"]
    about = (
        f"Images: {next(iter(cells.values()))['images']}. {height} x {width} pixels, "
        f"{settings['proposals']} proposals, {settings['detections']} detections, {settings['rounds']} rounds in which "
        f"the variants take turns; plan {Path(settings['plan']).stem}, rank and rates equal."
    )
    tables = (part for name, cell in cells.items() for part in (cell_table(name, cell), verdict(cell)))
    return page("# Multiples of kept filters", about, *tables)


def cell_table(name: str, cell: Cell) -> Table:
    """One row per rounding: MACs, median, spread, and the paired ratio to the first."""
    times_ms = {name: np.asarray(times) for name, times in cell["times_ms"].items()}
    first = next(iter(times_ms))
    counted = cell["complexity"]
    return tabulate(
        f"{CAPTIONS[name]}; 10th to 90th percentile in brackets",
        times_ms,
        {
            "Kept filters": str,
            "MACs": lambda row: f"{counted[row]['macs'] / 1e9:.2f} G",
            "Parameters": lambda row: f"{counted[row]['params'] / 1e6:.2f} M",
            "Median ms": lambda row: percentiles(times_ms[row], 1),
            "GMAC/s": lambda row: f"{counted[row]['macs'] / np.median(times_ms[row]) / 1e6:.1f}",
            f"Times faster than {first}": lambda row: percentiles(times_ms[first] / times_ms[row], 3),
        },
    )


def percentiles(values: np.ndarray, digits: int) -> str:
    """Median, and 10th to 90th percentile."""
    low, middle, high = (f"{value:.{digits}f}" for value in np.percentile(values, [10, 50, 90]))
    return f"{middle} ({low} to {high})"


def verdict(cell: Cell) -> str:
    """The rounding with the shortest median, and whether it stands out from the next."""
    times_ms = {name: np.asarray(times) for name, times in cell["times_ms"].items()}
    best, second = sorted(times_ms, key=lambda name: float(np.median(times_ms[name])))[:2]
    ratios = times_ms[second] / times_ms[best]
    note = "it stands out" if np.percentile(ratios, 10) > 1 else "the two cannot be told apart"
    ratio, _, range_ = percentiles(ratios, 3).partition(" ")
    return f"Shortest median: {best}. {second.capitalize()} take {ratio} times as long, call by call {range_}: {note}."


if __name__ == "__main__":
    run(Settings, main)

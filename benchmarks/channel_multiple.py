"""What rounding the kept filters is worth: Table III's plan with odd numbers, multiples of 8, 16 and 32.

The plan's rates stay; each number of kept filters becomes the odd number or the multiple next to it, so MACs differ
by what rounding does to them and stand beside the times. Timed in ONNX Runtime are the compressed ResNet-50 body and
the whole Faster R-CNN, the variants in turn, each with its CPDBlocks in the forms that were measured fastest on this
machine. Weights are random, normalisation calibrated on the images: nothing is said about AP. A finished cell (body,
detector) is written at once; running again does only what is missing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table3 import ROOT, calibrate, equalise, prepare_images, read_results
from torch import Tensor, nn

from norton_deploy import commands
from norton_deploy.compression.compress import channel_groups, compress, fit_plan
from norton_deploy.compression.lowering import lower_model
from norton_deploy.compression.surgery import output_width
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.cost.form_tuning import CPU, TimingTable, tune_blocks
from norton_deploy.cost.layer_shapes import layer_calls
from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import OPSET
from norton_deploy.export.static_roi_align import fix_sampling
from norton_deploy.files import atomic_write
from norton_deploy.inference.predictor import Image, Predictor, read_image
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.latency import balanced_orders
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.search.end_to_end import Workload, tuned_predictor
from norton_deploy.structures import Categories

CELLS = ("body", "detector")


@dataclass
class Settings:
    """Settings of the benchmark."""

    multiples: tuple[int, ...] = (1, 8, 16, 32)
    """Kept filters are the next multiple of these; 1 stands for the next odd number. The first is the baseline."""
    plan: Path = Path("configs/plans/table3.yaml")
    """Plan whose numbers are rounded."""
    image_size: tuple[int, int] = (800, 800)
    """Height and width."""
    proposals: int = 1000
    """Proposals per image."""
    detections: int = 100
    """Detections per image."""
    rounds: int = 8
    """Measured calls of each variant."""
    images: Path | None = None
    """Folder of photographs; without it synthetic scenes are drawn (and the results say so)."""
    out: Path = ROOT / "results" / "channel_multiple.json"
    """Results; a .md is written beside it."""
    work: Path = Path("runs/channel_multiple")
    """Folder for prepared images and layer times."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the results."""
    settings = parse_settings(Settings, argv, prog="channel_multiple", description=__doc__ or "")
    key = {name: str(value) for name, value in asdict(settings).items() if name not in ("out", "work")}
    results = read_results(settings.out, key)
    results.pop("tasks", None)
    cells = results.setdefault("cells", {})
    missing = [name for name in CELLS if name not in cells]
    if missing:
        settings.work.mkdir(parents=True, exist_ok=True)
        images, results["images"] = prepare_images(settings.images, settings.image_size, settings.work)
        models = build_models(settings, images)
        table = timing_table(settings)
        for name in missing:
            started = time.perf_counter()
            cells[name] = {**measure(name, models, images, table, settings), "provenance": provenance()}
            cells[name]["cell_s"] = round(time.perf_counter() - started, 1)
            commands.write_json(results, settings.out)
            print(f"{name}: {cells[name]['cell_s']} s", file=sys.stderr)
    text = "\n\n".join(part for name in CELLS for part in (cell_table(name, cells[name]), verdict(cells[name])))
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write(f"# Multiples of kept filters\n\nImages: {results['images']}. {about(settings)}\n\n{text}\n")
    print(text)
    return 0


def round_kept(count: int, width: int, multiple: int) -> int:
    """The multiple next to `count`, between one multiple and the width; for 1 the odd number not below it."""
    if multiple == 1:
        return min(count | 1, width)
    return min(max(multiple, round(count / multiple) * multiple), width)


def build_models(settings: Settings, images: Sequence[Path]) -> dict[str, nn.Module]:
    """One seeded dense detector, compressed by the plan with each rounding."""
    torch.manual_seed(0)
    dense = DetectorSettings().build("box")
    calibrate(dense, images)
    plan = fit_plan(dense, CompressionPlan.load(settings.plan))
    widths = {
        name: output_width(dense.get_submodule(group.producers[0])) for name, group in channel_groups(dense).items()
    }
    models: dict[str, nn.Module] = {}
    for multiple in settings.multiples:
        keep = {name: round_kept(count, widths[name], multiple) for name, count in plan.keep.items()}
        model = compress(dense, CompressionPlan(plan.architecture, plan.ranks, keep), starts=1)
        calibrate(model, images)
        equalise(model, settings.image_size, settings.proposals, settings.detections)
        models[variant(multiple)] = model
    return models


def variant(multiple: int) -> str:
    """How a rounding is called in the results."""
    return "odd numbers" if multiple == 1 else f"multiples of {multiple}"


def timing_table(settings: Settings) -> TimingTable:
    """This machine's layer times, kept for the next cells."""
    origin = provenance()
    machine = {"cpu": origin["machine"]["cpu"], "threads": origin["machine"]["torch_threads"], **origin["versions"]}
    return TimingTable(settings.work / "layer_times.json", machine)


def measure(
    cell: str, models: Mapping[str, nn.Module], images: Sequence[Path], table: TimingTable, settings: Settings
) -> dict[str, Any]:
    """Times of all variants in turn, MACs and parameters."""
    work = Workload(settings.image_size, settings.proposals, settings.detections)
    pixels = [read_image(path) for path in images]
    calls: dict[str, Callable[[int], object]] = {}
    complexity = {}
    for name, model in models.items():
        print(f"{cell}: exporting {name}", file=sys.stderr)
        if cell == "body":
            calls[name] = body_call(model, work, table)
        else:
            labels = tuple(range(1, 91))
            categories = Categories(labels, labels, tuple(f"class {label}" for label in labels))
            predictor = tuned_predictor(model, work, categories, table)
            calls[name] = detector_call(predictor, pixels)
        found = count_complexity(model, work.image_size, proposals=work.proposals, detections=work.detections)
        layers = [layer for layer in found.layers if cell == "detector" or layer.name.startswith("backbone.body.")]
        complexity[name] = {
            "macs": sum(layer.macs for layer in layers),
            "params": sum(layer.params for layer in layers),
        }
    times_ms = alternate(calls, settings.rounds)
    return {"complexity": complexity, "times_ms": {name: times.tolist() for name, times in times_ms.items()}}


def detector_call(predictor: Predictor, pixels: Sequence[Image]) -> Callable[[int], object]:
    """The whole detector on one image after the other."""
    return lambda step: predictor([pixels[step % len(pixels)]])


def body_call(model: Any, work: Workload, table: TimingTable) -> Callable[[int], object]:
    """The compressed body alone, image in and four feature maps out, as a call of an ONNX Runtime session."""
    import onnxruntime

    layers = layer_calls(model, work.image_size, proposals=work.proposals, detections=work.detections)
    forms = {tuning.name: tuning.form for tuning in tune_blocks(layers, table)}
    body = lower_model(fix_sampling(model), "grouped", forms).backbone.body
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "body.onnx"
        example = torch.zeros(1, 3, *work.image_size)
        program = torch.onnx.export(
            Stages(body).eval(), (example,), input_names=["images"], opset_version=OPSET, dynamo=True, optimize=False,
            verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(file)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        session = onnxruntime.InferenceSession(file, options, providers=[CPU])
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


def alternate(calls: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, np.ndarray]:
    """Times in ms of calls in turn, [rounds] each, after one round of warm-up; orders are balanced."""
    names, orders = list(calls), balanced_orders(len(calls))
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    for step in range(-1, rounds):
        for index in orders[step % len(orders)]:
            started = time.perf_counter()
            calls[names[index]](step)
            if step >= 0:
                times_ms[names[index]].append((time.perf_counter() - started) * 1e3)
    return {name: np.asarray(times) for name, times in times_ms.items()}


def cell_table(cell: str, found: dict[str, Any]) -> str:
    """One row per rounding: MACs, median, spread, and the paired ratio to the first."""
    times_ms = {name: np.asarray(times) for name, times in found["times_ms"].items()}
    first = next(iter(times_ms.values()))
    rows = []
    for name, times in times_ms.items():
        p10, p50, p90 = np.percentile(times, [10, 50, 90])
        low, ratio, high = np.percentile(first / times, [10, 50, 90])
        counted = found["complexity"][name]
        rows.append(
            (
                name,
                f"{counted['macs'] / 1e9:.2f} G",
                f"{counted['params'] / 1e6:.2f} M",
                f"{p50:.1f} ({p10:.1f} to {p90:.1f})",
                f"{counted['macs'] / p50 / 1e6:.1f}",
                f"{ratio:.3f} ({low:.3f} to {high:.3f})",
            )
        )
    header = ("Kept filters", "MACs", "Parameters", "Median ms", "GMAC/s", f"Times faster than {next(iter(times_ms))}")
    caption = {"body": "ResNet-50 body", "detector": "Whole Faster R-CNN, pixels to detections"}[cell]
    return Table(header, tuple(rows), f"{caption}; 10th to 90th percentile in brackets").to_markdown()


def verdict(found: dict[str, Any]) -> str:
    """The rounding with the shortest median, and whether it stands out from the next."""
    times_ms = {name: np.asarray(times) for name, times in found["times_ms"].items()}
    best, second = sorted(times_ms, key=lambda name: float(np.median(times_ms[name])))[:2]
    low, ratio, high = np.percentile(times_ms[second] / times_ms[best], [10, 50, 90])
    note = "it stands out" if low > 1 else "the two cannot be told apart"
    return (
        f"Shortest median: {best}. {second.capitalize()} take {ratio:.3f} times as long, call by call "
        f"({low:.3f} to {high:.3f}): {note}."
    )


def about(settings: Settings) -> str:
    """What was run, in a sentence."""
    height, width = settings.image_size
    return (
        f"{height} x {width} pixels, {settings.proposals} proposals, {settings.detections} detections, "
        f"{settings.rounds} rounds in which the variants take turns; plan {settings.plan.stem}, rank and rates equal."
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

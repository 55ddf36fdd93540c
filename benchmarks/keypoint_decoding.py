"""How often the graphs' keypoint search differs from torchvision's decoding, and what it costs.

Maps of three kinds (white noise, the worst that a predictor could give; smoothed noise, like a head that was hardly
trained; single peaks) and RoIs whose width and height are each log-uniform from 1 to 800 pixels are decoded by both.
A keypoint is missed when the value found is lower than torchvision's by more than rounding; the others that lie more
than a pixel away are ties. Then both decode the same 100 people at 800 x 800, in alternation: the search in ONNX
Runtime, torchvision in eager mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from benchmarks.lib.cells import RESULTS, ResultCells, run, settings_of, tabulate
from norton_deploy.cost.session import make_session
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.export.heatmap_argmax import best_pixel
from norton_deploy.export.onnx_export import OPSET

SIDE, SIZE, KEYPOINTS = 800, 28, 17
KINDS = ("noise", "smooth", "peak")
ROUNDING = 1e-5
"""Of a map's largest absolute value."""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/keypoint_decoding.py."""

    out: Path = RESULTS / "keypoint_decoding.json"
    """Results file; a Markdown table is written beside it."""
    rois: int = 1200
    """RoIs of each kind; each has 17 keypoints."""
    people: int = 100
    """RoIs that are timed."""
    repeats: int = 9
    """Timed runs of each decoder."""
    threads: int = 2
    """Threads of both."""


class Decoder(nn.Module):
    """The search alone, as a graph: maps [N, K, S, S], columns [N], rows [N] -> [N, K, 3]."""

    def forward(self, maps: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        """Best pixels and their values."""
        return torch.stack(best_pixel(maps, columns, rows, SIDE), dim=-1)


def main(settings: Settings) -> int:
    """Measure what is missing; status 1 when a keypoint was missed."""
    torch.set_num_threads(settings.threads)
    cells: dict[str, Callable[[], dict[str, Any]]] = {kind: partial(compare, kind, settings.rois) for kind in KINDS}
    results = ResultCells(settings.out, settings_of(settings), report)
    results.measure_all({**cells, "timing": partial(measure, settings)})
    return int(any(results.cells[kind]["missed"] for kind in KINDS))


def report(results: ResultCells) -> str:
    """Counts for each kind of map; the times are the caption."""
    timing = results.cells.get("timing")
    caption = "" if timing is None else (
        f"{timing['people']} people of an {SIDE} x {SIDE} image: {timing['search_ms']:.0f} ms for the search in ONNX "
        f"Runtime, {timing['torchvision_ms']:.0f} ms for torchvision in eager mode"
    )  # fmt: skip
    return tabulate(
        caption,
        [(kind, results.cells[kind]) for kind in KINDS if kind in results.cells],
        {
            "Maps": lambda row: row[0],
            "Keypoints": lambda row: str(row[1]["keypoints"]),
            "Off by more than 1 px": lambda row: str(row[1]["off_by_more_than_1_px"]),
            "Below the maximum": lambda row: str(row[1]["missed"]),
            "Largest shortfall": lambda row: f"{row[1]['largest_shortfall']:.2g}",
        },
    ).to_markdown()


def compare(kind: str, rois: int, chunk: int = 20) -> dict[str, Any]:
    """Counts over `rois` RoIs."""
    generator = torch.Generator().manual_seed(0)
    counts: dict[str, Any] = {"keypoints": 0, "off_by_more_than_1_px": 0, "missed": 0, "largest_shortfall": 0.0}
    for first in range(0, rois, chunk):
        maps = draw_maps(kind, min(chunk, rois - first), generator)
        sides = torch.exp(torch.rand(len(maps), 2, generator=generator) * torch.log(torch.tensor(float(SIDE)))).ceil()
        boxes = torch.cat([torch.zeros_like(sides), sides], dim=1)
        points, scores = heatmaps_to_keypoints(heatmaps_of(maps), boxes)
        x, y, found = best_pixel(maps, sides[:, 0], sides[:, 1], SIDE)
        off = (torch.stack([x, y], dim=-1) + 0.5 - points[..., :2]).norm(dim=-1) > 1
        shortfall = (scores - found) / maps.abs().amax((2, 3))
        counts["keypoints"] += off.numel()
        counts["off_by_more_than_1_px"] += int(off.sum())
        counts["missed"] += int((shortfall > ROUNDING).sum())
        counts["largest_shortfall"] = max(counts["largest_shortfall"], float(shortfall.max()))
    return counts


def draw_maps(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Maps [count, 17, 28, 28] before they are doubled."""
    noise = torch.randn(count, KEYPOINTS, SIZE, SIZE, generator=generator)
    if kind == "noise":
        return noise
    if kind == "smooth":
        return 3 * F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="replicate"), 3, 1)
    middle = torch.rand(count, KEYPOINTS, 2, generator=generator) * SIZE - 0.5
    width = 0.7 + 2 * torch.rand(count, KEYPOINTS, 1, 1, generator=generator)
    at = torch.arange(float(SIZE))
    square = (at - middle[..., :1])[..., None, :] ** 2 + (at - middle[..., 1:])[..., :, None] ** 2
    return 10 * torch.exp(-square / (2 * width**2)) - 5 + 0.3 * noise


def heatmaps_of(maps: Tensor) -> Tensor:
    """What torchvision's predictor makes of its maps."""
    return F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)


def measure(settings: Settings) -> dict[str, Any]:
    """Milliseconds of both decoders; people 27 to 665 px high."""
    generator = torch.Generator().manual_seed(0)
    maps = draw_maps("peak", settings.people, generator)
    height = torch.exp(torch.rand(settings.people, generator=generator) * 3.2 + 3.3)
    width = height * (0.25 + 0.5 * torch.rand(settings.people, generator=generator))
    columns, rows = width.ceil(), height.ceil()
    boxes = torch.stack([0 * columns, 0 * rows, columns, rows], dim=1)
    inputs = {"maps": maps, "columns": columns, "rows": rows}
    program = torch.onnx.export(
        Decoder().eval(), tuple(inputs.values()), dynamo=True, input_names=list(inputs), verbose=False,
        opset_version=OPSET,
    )  # fmt: skip
    assert program is not None
    session = make_session(program.model_proto.SerializeToString(), "cpu", threads=settings.threads)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    heatmaps = heatmaps_of(maps)
    calls = {
        "search_ms": lambda _: session.run(None, arrays),
        "torchvision_ms": lambda _: heatmaps_to_keypoints(heatmaps, boxes),
    }
    turns = time_in_turns(calls, rounds=settings.repeats)
    return {name: round(median(turns.of(name)), 1) for name in calls} | {"people": settings.people}


if __name__ == "__main__":
    run(Settings, main)

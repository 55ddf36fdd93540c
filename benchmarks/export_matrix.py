"""Does the parity gate refuse sound exports? Detectors of every kind, plan, target and precision, over several seeds.

A cell is one export of a detector with calibrated random weights and its comparison with eager mode, on one drawn
scene besides the gate's own. Random weights are hard on the gate: scores lie close together and heatmaps have many
peaks. A refusal here is a false alarm. tests/export/test_altered_graphs.py holds the other side, that altered graphs
are refused.

The results file is written after every cell; starting again continues.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, run, settings_of, tabulate
from norton_deploy.checkpoints.open_model import published_categories
from norton_deploy.compression.calibration import random_detector
from norton_deploy.errors import UserError
from norton_deploy.export.contract import Target
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.parity.export_checked import ExportOptions, export_checked
from norton_deploy.structures import TASKS, Task

MODELS = ("dense", "table3", "balanced", "fast")
TARGETS: tuple[Target, ...] = get_args(Target)
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/export_matrix.py."""

    out: Path = RESULTS / "export_matrix.json"
    """Results file; a Markdown table is written beside it."""
    image_size: tuple[int, int] = (320, 320)
    """Height and width of the graphs."""
    seeds: int = 3
    """Random detectors of each kind."""
    most: int | None = None
    """Stop after so many exports; starting again continues."""


@dataclass(frozen=True)
class Source:
    """A cell: detector, plan, target and precision."""

    seed: int
    task: Task
    plan: str
    target: Target
    precision: Any

    @property
    def name(self) -> str:
        """Of its cell."""
        return f"{self.task}, {self.plan}, {self.target}, {self.precision}, seed {self.seed}"


def main(settings: Settings) -> int:
    """Run the missing cells; status 1 if any export was refused."""
    results = ResultCells(settings.out, settings_of(settings, "seeds", "most"), report)
    missing = [source for source in sources(settings.seeds) if source.name not in results.cells]
    return results.measure_all({source.name: partial(export, source, settings) for source in missing[: settings.most]})


def sources(seeds: int) -> Iterator[Source]:
    """All cells, every kind before the next seed."""
    kinds = product(range(seeds), MODELS[::-1], TASKS[::-1], PRECISIONS, TARGETS)
    for seed, plan, task, precision, target in kinds:
        yield Source(seed, task, plan, target, precision)


def export(source: Source, settings: Settings) -> dict[str, Any]:
    """What the gate said."""
    model = detector(source.task, settings.image_size, source.plan, source.seed)
    categories = published_categories(source.task, 2 if source.task == "keypoint" else 91)
    options = ExportOptions(image_size=settings.image_size, target=source.target, precision=source.precision)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        try:
            found = export_checked(model, source.task, categories, file, options, scenes=1, report=lambda _: None)
        except UserError as error:
            return {"failure": str(error).replace(f"{folder}/", "")}
    return {
        "detections": found.parity.detections,
        "compared": found.parity.compared,
        "stages": {f"{stage.name}: {stage.measure}": stage.worst for stage in found.parity.stages},
        "export_s": round(found.export_s, 1),
        "parity_s": round(found.parity_s, 1),
    }


@lru_cache(1)
def detector(task: Task, image_size: tuple[int, int], plan: str, seed: int) -> GeneralizedRCNN:
    """That of the cells of all targets and precisions, which follow one another."""
    fitted = None if plan == "dense" else CompressionPlan.load(PLANS / f"{plan}.yaml")
    return random_detector(task, image_size, fitted, seed)


def report(results: ResultCells) -> str:
    """One row per kind of export."""
    rows = [
        (kind, [cell for name, cell in results.cells.items() if name.startswith(f"{kind}, seed")])
        for kind in (f"{t}, {p}, {g}, {c}" for t, p, g, c in product(TASKS, MODELS, TARGETS, PRECISIONS))
    ]

    seen = [row for row in rows if row[1]]

    def worst(row: tuple[str, list[Cell]], stage: str) -> str:
        values = [cell["stages"][stage] for cell in row[1] if stage in cell.get("stages", {})]
        return f"{max(values):.2g}" if values else "-"

    refused = [name for name, cell in results.cells.items() if "failure" in cell]
    height, width = results.settings["image_size"]
    table = tabulate(
        f"Sound exports refused: {len(refused)} of {len(results.cells)} at {height}x{width}, random weights; "
        f"{len(seen)} of {len(rows)} kinds were run",
        seen,
        {
            "Detector, plan, target, precision": lambda row: row[0],
            "Exports": lambda row: str(len(row[1])),
            "Refused": lambda row: str(sum("failure" in cell for cell in row[1])),
            "Final box distance, px": lambda row: worst(row, "final: box distance, px"),
            "Final score difference": lambda row: worst(row, "final: score difference"),
            "Heatmap loss": lambda row: worst(row, "final: heatmap loss at keypoint"),
            "Keypoint to maximum, px": lambda row: worst(row, "final: keypoint to maximum, px"),
        },
    ).to_markdown()
    return "\n\n".join([table, *(f"{name}: {results.cells[name]['failure']}" for name in refused)])


if __name__ == "__main__":
    run(Settings, main)

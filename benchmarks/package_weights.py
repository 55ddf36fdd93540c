"""Put a trained, compressed mask or keypoint detector into the package, in float16 (norton_deploy/checkpoints/).

The packaged file and the checkpoint it is made from are both evaluated: float16 rounds the weights.

    python benchmarks/package_weights.py --model FILE --dense FILE --data runs/data
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.cells import RESULTS, ResultCells, run, tabulate
from norton_deploy.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from norton_deploy.data.synthetic import CATEGORIES
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.files import atomic_write
from norton_deploy.inference.loading import packaged_path
from norton_deploy.reporting.provenance import provenance

LARGEST_MB = 12.0
"""No packaged file may be larger, in millions of bytes."""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/package_weights.py."""

    model: Path
    """Compressed detector that was trained on the embedded data (.safetensors)."""
    data: Path
    """Embedded data (tools/make_synthetic.py), whose held-out images both files are evaluated on."""
    out: Path = RESULTS / "packaged.json"
    """Results file, one entry a task; a Markdown table is written beside it."""
    dense: Path | None = None
    """The dense detector that it was compressed from, to be evaluated beside it."""


def main(settings: Settings) -> None:
    """Check the detector, write it, and evaluate it."""
    loaded = load_checkpoint(settings.model)
    header = loaded.header
    if header.task not in ("mask", "keypoint") or header.plan is None:
        raise UserError(f"{settings.model}: expected a compressed mask or keypoint detector")
    drawn = {category["name"] for category in CATEGORIES}
    if not set(header.categories.names) <= drawn:
        raise UserError(f"{settings.model}: its categories are not those of the drawn scenes")
    size_mb = 2 * sum(tensor.numel() for tensor in loaded.model.state_dict().values()) / 1e6
    if size_mb > LARGEST_MB:
        raise UserError(
            f"{settings.model}: {size_mb:.1f} MB in float16, at most {LARGEST_MB:g} MB belong in the package"
        )
    ResultCells(settings.out, {}, report).measure(header.task, lambda: package(loaded, settings), again=True)


def package(loaded: Checkpoint, settings: Settings) -> dict[str, Any]:
    """Write the packaged file once it is evaluated; figures of both files."""
    task: Any = loaded.header.task
    out = packaged_path(task)
    with tempfile.TemporaryDirectory() as folder:  # what is packaged stays until its successor is evaluated
        new = Path(folder) / out.name
        header = loaded.header.made_by(provenance()["command"], settings.model)
        save_checkpoint(new, loaded.model, header, half=True)
        cell: dict[str, Any] = {"file": out.name, "bytes": new.stat().st_size}
        dense = {} if settings.dense is None else {"dense": settings.dense}
        for name, file in {**dense, "float32": settings.model, "float16": new}.items():
            figures = evaluate_file(file, settings.data, task, progress=False).to_dict()
            cell[name] = {key: figures[key] for key in ("images", "table3", "metrics")}
        with atomic_write(out) as stream:
            stream.write(new.read_bytes())
    return cell


def report(results: ResultCells) -> str:
    """One row a packaged detector."""
    return tabulate(
        "Detectors in the package: AP of the task's own kind on drawn images",
        results.cells.items(),
        {
            "Task": lambda row: row[0],
            "File": lambda row: row[1]["file"],
            "Size": lambda row: f"{row[1]['bytes'] / 1e6:.1f} MB",
            "Held-out images": lambda row: str(row[1]["float16"]["images"]),
            "AP of the dense one": lambda row: f"{row[1]['dense']['table3']['AP']:.4f}" if "dense" in row[1] else "-",
            "AP of the checkpoint": lambda row: f"{row[1]['float32']['table3']['AP']:.4f}",
            "AP of the packaged file, float16": lambda row: f"{row[1]['float16']['table3']['AP']:.4f}",
        },
    ).to_markdown()


if __name__ == "__main__":
    run(Settings, main)

"""Put a trained, compressed mask or keypoint detector into the package, in float16 (norton_deploy/checkpoints/).

The packaged file and the checkpoint it is made from are both evaluated: float16 rounds the weights.

    python benchmarks/package_weights.py --model FILE --data runs/table3_accuracy/data
"""

import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy import commands
from norton_deploy.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from norton_deploy.config import parse_settings
from norton_deploy.data.synthetic import CATEGORIES
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.inference.loading import packaged_path
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.structures import Task

LARGEST_MB = 12.0
"""No packaged file may be larger, in millions of bytes."""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/package_weights.py."""

    model: Path
    """Detector compressed by fast.yaml and trained on the embedded data (.safetensors)."""
    data: Path
    """Embedded data (tools/make_synthetic.py), whose held-out images both files are evaluated on."""
    out: Path = Path(__file__).parent / "results" / "packaged.json"
    """Results file, one entry a task; a Markdown table is written beside it."""


def main() -> int:
    """Check the detector, write it, and evaluate it."""
    settings = parse_settings(Settings, prog="package_weights", description=__doc__ or "")
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
    out = packaged_path(header.task)  # type: ignore[arg-type]  # mask or keypoint, checked above
    command = shlex.join(["benchmarks/package_weights.py", *sys.argv[1:]])
    results = json.loads(settings.out.read_text()) if settings.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:  # what is packaged stays until its successor is evaluated
        new = Path(folder) / out.name
        save_checkpoint(new, loaded.model, header.made_by(command, settings.model), half=True)
        results[header.task] = {
            "file": out.name,
            "bytes": new.stat().st_size,
            "float32": evaluate(settings.model, header.task, settings.data),
            "float16": evaluate(new, header.task, settings.data),
            "provenance": provenance(),
        }
        with atomic_write(out) as stream:
            stream.write(new.read_bytes())
    commands.write_json(results, settings.out)
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write(packaged_table(results).to_markdown() + "\n")
    return 0


def evaluate(model: Path, task: Task, data: Path) -> dict[str, Any]:
    """Figures of tools/eval_det.py on the held-out images."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "metrics.json"
        argv = ["--task", task, "--data", str(data), "--model", str(model), "--no-progress", "--json", str(written)]
        if commands.run("eval_det", argv):
            raise UserError(f"{model}: tools/eval_det.py failed on it")
        figures: dict[str, Any] = json.loads(written.read_text())
    return {name: figures[name] for name in ("images", "table3", "metrics")}


def packaged_table(results: dict[str, Any]) -> Table:
    """One row a packaged detector."""
    rows = []
    for task, entry in results.items():
        before, after = (entry[precision]["table3"]["AP"] for precision in ("float32", "float16"))
        size, images = f"{entry['bytes'] / 1e6:.1f} MB", str(entry["float16"]["images"])
        rows.append((task, entry["file"], size, images, f"{before:.4f}", f"{after:.4f}"))
    header = ("Task", "File", "Size", "Held-out images", "AP of the checkpoint", "AP of the packaged file, float16")
    return Table(header, tuple(rows), "Detectors in the package: AP of the task's own kind on drawn images")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

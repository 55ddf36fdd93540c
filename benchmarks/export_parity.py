"""Exports every kind of detector for both targets and records how far each graph is from eager mode.

Twelve cells: box, mask and keypoint detectors, dense and compressed, for each target. Each is exported at
--image-size; then the embedded images (and those of --images) run through torchvision's eager model and the exported
graph in ONNX Runtime. The weights are random, calibrated so that detections spread over scores; with --models the
given checkpoints are exported instead, each into the cell of its task and kind, and --eval adds AP before (eager mode,
torchvision's own decoding) and after (give it images of the graph's size: eager mode resizes others in its own way,
and the letterbox would be measured too).

The results file is written after every cell, with the machine, versions, date and command of that cell. Starting
again continues: a cell that is there is not run again, a failed one only with --retry, and its failure stays on
record.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from norton_deploy.checkpoints.checkpoint import read_header
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.commands import export_onnx
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import find_images
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.export.static_rcnn import TARGETS
from norton_deploy.files import atomic_write
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.structures import TASKS

RESULTS = Path(__file__).parent / "results"
KINDS = ("dense", "NORTON")
CHECKPOINT = "last.safetensors"
MEASURES = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP (OKS)"}
CELLS = tuple(f"{task}, {kind}, {target}" for task in TASKS for kind in KINDS for target in TARGETS)


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/export_parity.py."""

    out: Path = RESULTS / "export_parity.json"
    """Results file; a Markdown table is written beside it."""
    plan: Path = Path("configs/plans/table3.yaml")
    """Plan of the compressed detectors with random weights."""
    models: tuple[Path, ...] = ()
    """Trained detectors to export instead of random ones, by their own settings: files, or folders in which every
    last.safetensors is taken."""
    eval: Path | None = None
    """Dataset in COCO's layout on whose val split AP is measured before and after."""
    image_size: tuple[int, int] = (192, 192)
    """Height and width of the graphs."""
    embedded: int = 50
    """How many embedded scenes to compare on."""
    images: Path | None = None
    """Folder of further images."""
    more_images: int = 30
    """How many of those at most."""
    retry: bool = False
    """Run the cells that failed once more."""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; status 1 when any graph failed its parity check."""
    settings = parse_settings(Settings, argv, prog="export_parity", description=__doc__ or "")
    planned = plan_cells(settings)
    with tempfile.TemporaryDirectory() as folder:
        images = collect_images(settings, Path(folder))
        results = open_results(settings, len(images))
        for name, arguments in planned.items():
            earlier = results["cells"].get(name)
            if earlier is not None and not (settings.retry and "failure" in earlier):
                continue
            print(f"== {name}", flush=True)
            started = time.perf_counter()
            cell = run_cell(arguments, images, settings, Path(folder))
            cell["seconds"] = round(time.perf_counter() - started, 1)
            cell["provenance"] = provenance()
            if earlier is not None:
                cell["earlier_failures"] = [*earlier.pop("earlier_failures", []), earlier]
            results["cells"][name] = cell
            write_results(settings.out, results)
    write_results(settings.out, results)
    missing = [name for name in CELLS if name not in results["cells"]]
    failed = [name for name, cell in results["cells"].items() if "failure" in cell]
    print(f"{len(results['cells'])} of {len(CELLS)} cells in {settings.out.name}, {len(failed)} failed: {failed}")
    if missing:
        print(f"not run, no model given: {'; '.join(missing)}")
    return int(bool(failed))


def plan_cells(settings: Settings) -> dict[str, list[str]]:
    """Cell -> what tells export_onnx which detector and target it is.

    Raises:
        UserError: a folder without checkpoints, a model that is no detector, or two models for one cell.
    """
    if not settings.models:
        kinds: dict[str, list[str]] = {"dense": [], "NORTON": ["--plan", str(settings.plan)]}
        detectors = {(task, kind): ["--task", task, *kinds[kind]] for task in TASKS for kind in KINDS}
    else:
        detectors = {}
        for model in find_models(settings.models):
            header = read_header(model) if model.suffix == ".safetensors" else open_model(str(model)).header
            if header.task not in TASKS:
                raise UserError(f"{model}: a checkpoint of task '{header.task}', expected {', '.join(TASKS)}")
            key = header.task, KINDS[header.plan is not None]
            if key in detectors:
                raise UserError(f"{model} and {detectors[key][1]}: both are {', '.join(key)}; give one of them")
            detectors[key] = ["--model", str(model)]
    return {
        f"{task}, {kind}, {target}": [*detectors[task, kind], "--target", target]
        for task in TASKS
        for kind in KINDS
        for target in TARGETS
        if (task, kind) in detectors
    }


def find_models(paths: tuple[Path, ...]) -> list[Path]:
    """Files as they are, and the checkpoints in folders."""
    models = []
    for path in paths:
        found = sorted(path.rglob(CHECKPOINT)) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no {CHECKPOINT} in this folder")
        models += found
    return models


def open_results(settings: Settings, images: int) -> dict[str, Any]:
    """What the results file holds already, or empty results.

    Raises:
        UserError: the file's cells were made with other settings.
    """
    described = {
        "image_size": list(settings.image_size),
        "images": {"embedded": settings.embedded, "real": images - settings.embedded},
        "eval": None if settings.eval is None else settings.eval.name,
        "weights": "random" if not settings.models else "trained",
    }
    if not settings.out.is_file():
        return {"settings": described, "cells": {}}
    results: dict[str, Any] = json.loads(settings.out.read_text())
    if results.get("settings") != described:
        raise UserError(
            f"{settings.out}: made with {results.get('settings')}, now {described}; give another --out, or move it away"
        )
    return results


def collect_images(settings: Settings, folder: Path) -> list[Path]:
    """Embedded scenes as PNG files of the graph's size, then the user's images."""
    paths = []
    for seed in range(settings.embedded):
        paths.append(folder / f"embedded-{seed:03d}.png")
        cv2.imwrite(str(paths[-1]), draw_scene(seed, settings.image_size).image[:, :, ::-1])
    if settings.images is not None:
        found = find_images(settings.images)
        paths += found[:: max(1, len(found) // settings.more_images)][: settings.more_images]
    return paths


def run_cell(arguments: list[str], images: list[Path], settings: Settings, folder: Path) -> dict[str, Any]:
    """Export and compare; the command's report, or why there is none."""
    height, width = settings.image_size
    argv = [*arguments, "--image-size", str(height), str(width), "--parity-images", str(len(images))]
    argv += ["--images", *map(str, images), "--out", str(folder / "graph.onnx"), "--json", str(folder / "report.json")]
    if settings.eval is not None:
        argv += ["--eval", str(settings.eval)]
    try:
        export_onnx.main(argv)
    except UserError as error:
        return {"failure": str(error).replace(f"{folder}/", "")}
    except Exception as error:  # One broken cell must not cost the others; it stands in the results.
        return {"failure": f"{type(error).__name__}: {error}".replace(f"{folder}/", "")}
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    del report["file"], report["parity"]["graph"]  # A temporary file's name says nothing.
    return report


def write_results(path: Path, results: dict[str, Any]) -> None:
    """The JSON file, and the table beside it."""
    with atomic_write(path, "w") as stream:
        json.dump(results, stream, indent=1)
    with atomic_write(path.with_suffix(".md"), "w") as stream:
        stream.write(table_of(results).to_markdown() + "\n")


def table_of(results: dict[str, Any]) -> Table:
    """One row per cell, in a fixed order; cells that were not run say so."""
    rows = []
    for name in CELLS:
        cell = results["cells"].get(name, {"failure": "not run"})
        verdict = cell.get("failure", "equal")
        if "earlier_failures" in cell:
            verdict += f" (failed before: {'; '.join(earlier['failure'] for earlier in cell['earlier_failures'])})"
        parity = cell.get("parity", {"stages": [], "detections": 0})
        last = [stage for stage in parity["stages"] if stage["name"] in ("masks", "keypoints", "final")]
        figures = "; ".join(f"{stage['measure']} {stage['worst']:.2g}" for stage in last)
        precision = cell.get("average_precision", {"before": {}, "after": {}})
        scores = "; ".join(
            f"{MEASURES[measure]} {before:.4f} -> {precision['after'][measure]:.4f}"
            for measure, before in precision["before"].items()
        )
        export_s = f"{cell['export_s']:.0f} s" if "export_s" in cell else "-"
        date = cell.get("provenance", {}).get("date", "-")
        rows.append((name, verdict, str(parity["detections"]), figures or "-", scores or "-", export_s, date))
    settings = results["settings"]
    height, width = settings["image_size"]
    caption = (
        f"Exported graphs against eager mode, {settings['weights']} weights, {height}x{width}, "
        f"on {sum(settings['images'].values())} images ({settings['images']['real']} real)"
    )
    titles = ("Detector, target", "Verdict", "Detections", "Worst difference", "Eager -> graph", "Export", "Date (UTC)")
    return Table(titles, tuple(rows), caption)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

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

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, run, tabulate
from norton_deploy.checkpoints.checkpoint import read_header
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.image_file import read_image
from norton_deploy.data.image_folder import find_images
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.export.contract import Target
from norton_deploy.inference.predictor import Image
from norton_deploy.parity.export_checked import ExportOptions, export_checked, open_detector
from norton_deploy.structures import TASKS, Task

KINDS = ("dense", "NORTON")
TARGETS: tuple[Target, ...] = get_args(Target)
CHECKPOINT = "last.safetensors"
MEASURES = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP (OKS)"}
CELLS = tuple(f"{task}, {kind}, {target}" for task in TASKS for kind in KINDS for target in TARGETS)


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/export_parity.py."""

    out: Path = RESULTS / "export_parity.json"
    """Results file; a Markdown table is written beside it."""
    plan: Path = PLANS / "table3.yaml"
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


@dataclass(frozen=True)
class Source:
    """A detector to export: its file, or the task and plan of one with random weights; and the target."""

    task: Task
    model: Path | None = None
    plan: Path | None = None
    target: Target = "onnxruntime"


def main(settings: Settings) -> int:
    """Measure what is missing; status 1 when any graph failed its parity check."""
    planned = plan_cells(settings)
    images = collect_images(settings)
    described = {
        "image_size": settings.image_size,
        "images": {"embedded": settings.embedded, "real": len(images) - settings.embedded},
        "eval": None if settings.eval is None else settings.eval.name,
        "weights": "random" if not settings.models else "trained",
    }
    results = ResultCells(settings.out, described, report)
    for name, source in planned.items():
        earlier = results.cells.get(name, {})
        again = settings.retry and "failure" in earlier
        results.measure(name, partial(run_cell, source, images, settings, earlier), again=again)
    results.write()
    failed = [name for name, cell in results.cells.items() if "failure" in cell]
    print(f"{len(results.cells)} of {len(CELLS)} cells in {settings.out.name}, {len(failed)} failed: {failed}")
    return int(bool(failed))


def plan_cells(settings: Settings) -> dict[str, Source]:
    """Cell -> the detector and target that it is.

    Raises:
        UserError: a folder without checkpoints, a model that is no detector, or two models for one cell.
    """
    plans = {"dense": None, "NORTON": settings.plan}
    detectors = {(task, kind): Source(task, plan=plans[kind]) for task in TASKS for kind in KINDS}
    if settings.models:
        detectors = {}
    for model in find_models(settings.models):
        header = read_header(model) if model.suffix == ".safetensors" else open_model(str(model)).header
        if header.task == "cls":
            raise UserError(f"{model}: a checkpoint of task '{header.task}', expected {', '.join(TASKS)}")
        key = header.task, KINDS[header.plan is not None]
        if key in detectors:
            raise UserError(f"{model} and {detectors[key].model}: both are {', '.join(key)}; give one of them")
        detectors[key] = Source(header.task, model)
    return {
        f"{task}, {kind}, {target}": replace(detectors[task, kind], target=target)
        for task in TASKS
        for kind in KINDS
        for target in TARGETS
        if (task, kind) in detectors
    }


def find_models(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, and the checkpoints in folders."""
    models = []
    for path in paths:
        found = sorted(path.rglob(CHECKPOINT)) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no {CHECKPOINT} in this folder")
        models += found
    return models


def collect_images(settings: Settings) -> list[Image]:
    """Embedded scenes of the graph's size, then the user's images."""
    images = [draw_scene(seed, settings.image_size).image for seed in range(settings.embedded)]
    if settings.images is not None:
        found = find_images(settings.images)
        step = max(1, len(found) // settings.more_images)
        images += [read_image(path) for path in found[::step][: settings.more_images]]
    return images


def run_cell(source: Source, images: Sequence[Image], settings: Settings, earlier: Cell) -> dict[str, Any]:
    """Export and compare; what was found, or why nothing was, after the failures before it."""
    failures = [*earlier.pop("earlier_failures", []), earlier] if earlier else []
    before = {"earlier_failures": failures} if failures else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {**export(source, images, settings, Path(folder)), **before}
        except UserError as error:
            message = str(error)
        except Exception as error:  # One broken cell must not cost the others; it stands in the results.
            message = f"{type(error).__name__}: {error}"
        return {"failure": message.replace(f"{folder}/", ""), **before}


def export(source: Source, images: Sequence[Image], settings: Settings, folder: Path) -> dict[str, Any]:
    """The report of an export."""
    model = None if source.model is None else str(source.model)
    detector, task, categories = open_detector(model, source.task, plan=source.plan, image_size=settings.image_size)
    dataset = None if settings.eval is None else CocoDetection(settings.eval, "val", task, categories=categories)
    options = ExportOptions(image_size=settings.image_size, target=source.target)
    note = partial(print, file=sys.stderr)
    found = export_checked(
        detector, task, categories, folder / "graph.onnx", options, images, dataset=dataset, report=note
    ).to_dict()
    del found["file"], found["parity"]["graph"]  # A temporary file's name says nothing.
    return found


def report(results: ResultCells) -> str:
    """One row per cell, in a fixed order; cells that were not run say so."""
    cells = [(name, results.cells.get(name, {"failure": "not run"})) for name in CELLS]

    def verdict(row: tuple[str, Cell]) -> str:
        earlier = "; ".join(failed["failure"] for failed in row[1].get("earlier_failures", []))
        return f"{row[1].get('failure', 'equal')}{f' (failed before: {earlier})' if earlier else ''}"

    def worst(row: tuple[str, Cell]) -> str:
        stages = row[1].get("parity", {}).get("stages", [])
        last = [stage for stage in stages if stage["name"] in ("masks", "keypoints", "final")]
        return "; ".join(f"{stage['measure']} {stage['worst']:.2g}" for stage in last) or "-"

    def precision(row: tuple[str, Cell]) -> str:
        before, after = (row[1].get("average_precision", {}).get(when, {}) for when in ("before", "after"))
        return "; ".join(f"{MEASURES[key]} {value:.4f} -> {after[key]:.4f}" for key, value in before.items()) or "-"

    settings = results.settings
    height, width = settings["image_size"]
    return tabulate(
        f"Exported graphs against eager mode, {settings['weights']} weights, {height}x{width}, "
        f"on {sum(settings['images'].values())} images ({settings['images']['real']} real)",
        cells,
        {
            "Detector, target": lambda row: row[0],
            "Verdict": verdict,
            "Detections": lambda row: str(row[1].get("parity", {}).get("detections", 0)),
            "Worst difference": worst,
            "Eager -> graph": precision,
            "Export": lambda row: f"{row[1]['export_s']:.0f} s" if "export_s" in row[1] else "-",
            "Date (UTC)": lambda row: row[1].get("provenance", {}).get("date", "-"),
        },
    ).to_markdown()


if __name__ == "__main__":
    run(Settings, main)

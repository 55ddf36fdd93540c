"""Exports every kind of detector for both targets and records how far each graph is from eager mode.

For each task, dense and compressed, and each target: export at --image-size, then run the embedded images (and
those of --images) through torchvision's eager model and the exported graph in ONNX Runtime. The weights are
random, calibrated so that detections spread over scores; with --models the given checkpoints are exported
instead, and --eval adds AP before and after (give it images of the graph's size: eager mode resizes others in
its own way, and the letterbox would be measured too). A cell that is in the results file already is not run
again.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2

from norton_deploy.commands import export_onnx
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import find_images
from norton_deploy.data.synthetic_coco import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.structures import TASKS

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/export_parity.py."""

    out: Path = RESULTS / "export_parity.json"
    """Results file; a Markdown table is written beside it."""
    plan: Path = Path("configs/plans/table3.yaml")
    """Plan of the compressed detectors."""
    models: tuple[Path, ...] = ()
    """Trained checkpoints to export instead of random detectors, by their own settings."""
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


def main() -> int:
    """Run the benchmark; status 1 when any graph failed its parity check."""
    settings = parse_settings(Settings, prog="export_parity", description=__doc__ or "")
    results = json.loads(settings.out.read_text()) if settings.out.is_file() else {"cells": {}}
    with tempfile.TemporaryDirectory() as folder:
        images = _images(settings, Path(folder))
        for name, arguments in _cells(settings).items():
            if name in results["cells"]:
                continue
            print(f"== {name}", flush=True)
            started = time.perf_counter()
            results["cells"][name] = _export(arguments, images, settings, Path(folder))
            results["cells"][name]["seconds"] = round(time.perf_counter() - started, 1)
            results["provenance"] = provenance()
            results["image_size"] = settings.image_size
            results["images"] = {"embedded": settings.embedded, "real": len(images) - settings.embedded}
            with atomic_write(settings.out, "w") as stream:
                json.dump(results, stream, indent=1)
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write(_table(results).to_markdown() + "\n")
    return int(any("failure" in cell for cell in results["cells"].values()))


def _cells(settings: Settings) -> dict[str, list[str]]:
    cells = {}
    for target in ("onnxruntime", "tensorrt"):
        for task in TASKS if not settings.models else ():
            cells[f"{task}, dense, {target}"] = ["--task", task, "--target", target]
            plan = ["--plan", str(settings.plan)]
            cells[f"{task}, {settings.plan.stem}, {target}"] = ["--task", task, "--target", target, *plan]
        for model in settings.models:
            cells[f"{model.parent.name}/{model.name}, {target}"] = ["--model", str(model), "--target", target]
    return cells


def _images(settings: Settings, folder: Path) -> list[Path]:
    """Embedded scenes as PNG files of the graph's size, then the user's images."""
    paths = []
    for seed in range(settings.embedded):
        paths.append(folder / f"embedded-{seed:03d}.png")
        cv2.imwrite(str(paths[-1]), draw_scene(seed, settings.image_size).image[:, :, ::-1])
    if settings.images is not None:
        found = find_images(settings.images)
        paths += found[:: max(1, len(found) // settings.more_images)][: settings.more_images]
    return paths


def _export(arguments: list[str], images: list[Path], settings: Settings, folder: Path) -> dict:
    height, width = settings.image_size
    argv = [*arguments, "--image-size", str(height), str(width), "--parity-images", str(len(images))]
    argv += ["--images", *map(str, images), "--out", str(folder / "graph.onnx"), "--json", str(folder / "report.json")]
    if settings.eval is not None:
        argv += ["--eval", str(settings.eval)]
    try:
        export_onnx.main(argv)
    except UserError as error:
        return {"failure": str(error)}
    report = json.loads((folder / "report.json").read_text())
    del report["file"], report["parity"]["graph"]  # A temporary file's name says nothing.
    return report


def _table(results: dict) -> Table:
    rows = []
    for name, cell in results["cells"].items():
        verdict = cell.get("failure", "equal")
        parity = cell.get("parity", {"stages": [], "detections": 0})
        last = [stage for stage in parity["stages"] if stage["name"] in ("masks", "keypoints", "final")]
        figures = "; ".join(f"{stage['measure']} {stage['worst']:.2g}" for stage in last)
        export_s = f"{cell['export_s']:.0f} s" if "export_s" in cell else "-"
        precision = cell.get("average_precision", {})
        scores = " -> ".join(f"{precision[moment]:.4f}" for moment in ("before", "after") if moment in precision)
        rows.append((name, verdict, str(parity["detections"]), figures, scores or "-", export_s))
    total = sum(results["images"].values())
    caption = f"Exported graphs against eager mode on {total} images ({results['images']['real']} real)"
    return Table(
        ("Detector, target", "Verdict", "Detections", "Worst difference", "AP eager -> graph", "Export"),
        tuple(rows),
        caption,
    )


if __name__ == "__main__":
    sys.exit(main())

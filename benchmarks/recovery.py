"""What quick recovery without labels is worth in AP, before any fine-tuning.

A trained dense detector is compressed by several plans and evaluated as it is, after BatchNorm re-estimation, after
the layer-wise least-squares refit, and after both (the refit first). Recovery sees training images without their
labels; AP is that of the val split. As a control, the dense detector itself is re-estimated. Each cell is two
commands, tools/compress.py and tools/eval_det.py, and is not run again when it is in the results file.

A plan for torchvision's widths is brought to the detector's: the same share of every group's filters.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.narrow_plan import narrow_plan
from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.commands import compress, eval_det, write_json
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, sha256_of
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table

RESULTS = Path(__file__).parent / "results"
PLANS = Path("configs/plans")
GENTLE = "body at rank 1"
CONTROL = "dense"
VARIANTS = ("as it is", "re-estimation", "refit", "refit, re-estimation")
NOT_SETTINGS = ("out", "work", "plans", "gentle", "workers")


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/recovery.py."""

    model: Path
    """Trained dense detector (.safetensors)."""
    data: Path
    """Dataset in COCO's layout that it was trained on."""
    plans: tuple[Path, ...] = (PLANS / "table3.yaml", PLANS / "balanced.yaml", PLANS / "fast.yaml")
    """Plans to compress it by."""
    gentle: bool = True
    """Also try the body's 3x3 convolutions at rank 1 without any pruning, where some AP survives compression."""
    refit_images: int = 64
    """Unlabelled images for the refit."""
    reestimate_images: int = 256
    """Unlabelled images for the re-estimation."""
    val_images: int | None = None
    """Evaluate on the first so many images of val only."""
    workers: int = 1
    """Processes that decode images."""
    out: Path = RESULTS / "recovery.json"
    """Results file; a Markdown table is written beside it."""
    work: Path = Path("runs/recovery")
    """Folder for plans and checkpoints."""


def main() -> int:
    """Run the cells that are missing and write the results."""
    settings = parse_settings(Settings, prog="recovery", description=__doc__ or "")
    results = read_results(settings)
    dense = load_checkpoint(settings.model)
    task, shape = dense.header.task, dense.header.settings
    if task == "cls" or dense.header.plan is not None:
        raise UserError(f"{settings.model}: expected a dense detector")
    full = DetectorSettings(num_classes=shape.num_classes).build(task)
    plans = {path.stem: CompressionPlan.load(path) for path in settings.plans}
    if settings.gentle:
        body = CompressionPlan.load(PLANS / "table3.yaml")
        plans = {GENTLE: CompressionPlan(body.architecture, body.ranks, {}, "rank 1, no pruning"), **plans}
    results["task"] = task
    if CONTROL not in results["cells"]:
        record(settings, results, CONTROL, evaluate(settings, task, settings.model))
    if f"{CONTROL}: re-estimation" not in results["cells"]:  # what re-estimation does where nothing was compressed
        CompressionPlan("rcnn").save(plan_file(settings, CONTROL))
        record(settings, results, f"{CONTROL}: re-estimation", measure(settings, task, CONTROL, "re-estimation"))
    for name, plan in plans.items():
        narrow_plan(plan, dense.model, full).save(plan_file(settings, name))
        for variant in VARIANTS:
            if f"{name}: {variant}" not in results["cells"]:
                print(f"== {name}: {variant}", flush=True)
                record(settings, results, f"{name}: {variant}", measure(settings, task, name, variant))
    return 0


def plan_file(settings: Settings, name: str) -> Path:
    """The plan in the widths of the detector."""
    return settings.work / f"{name.replace(' ', '-')}.yaml"


def measure(settings: Settings, task: str, name: str, variant: str) -> dict[str, Any]:
    """Compress with the variant's recovery, then evaluate."""
    checkpoint, figures = settings.work / "compressed.safetensors", settings.work / "compressed.json"
    argv = ["--model", str(settings.model), "--plan", str(plan_file(settings, name)), "--out", str(checkpoint)]
    images = str(settings.data / "train2017")
    if "refit" in variant:
        argv += ["--refit", images, "--refit-images", str(settings.refit_images)]
    if "re-estimation" in variant:
        argv += ["--reestimate", images, "--reestimate-images", str(settings.reestimate_images)]
    started = time.perf_counter()
    compress.main([*argv, "--json", str(figures)])
    seconds = time.perf_counter() - started
    size = json.loads(figures.read_text())
    return {
        "compress": f"tools/compress.py {' '.join(argv)}",
        "compress_s": round(seconds, 1),
        "macs": size["macs"],
        "params": size["params"],
        **evaluate(settings, task, checkpoint),
    }


def evaluate(settings: Settings, task: str, model: Path) -> dict[str, Any]:
    """AP and AR on the val split."""
    figures = settings.work / "metrics.json"
    argv = ["--task", task, "--data", str(settings.data), "--model", str(model), "--workers", str(settings.workers)]
    argv += [] if settings.val_images is None else ["--limit", str(settings.val_images)]
    eval_det.main([*argv, "--no-progress", "--json", str(figures)])
    found = json.loads(figures.read_text())
    return {"images": found["images"], "metrics": found["metrics"]}


def read_results(settings: Settings) -> dict[str, Any]:
    """What an earlier run with the same settings left, or a frame for the results."""
    if not settings.model.is_file():
        raise UserError(f"{settings.model}: no such file")
    key = {name: str(value) for name, value in asdict(settings).items() if name not in NOT_SETTINGS}
    key["model_sha256"] = sha256_of(settings.model)
    if not settings.out.is_file():
        return {"settings": key, "cells": {}}
    results: dict[str, Any] = json.loads(settings.out.read_text())
    if results["settings"] != key:
        raise UserError(f"{settings.out}: was measured with other settings; move it away or choose another --out")
    return results


def record(settings: Settings, results: dict[str, Any], name: str, cell: dict[str, Any]) -> None:
    """Add a cell to the results and write them and their table."""
    results["cells"][name] = cell | {"provenance": provenance()}
    write_json(results, settings.out)
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write(table(results).to_markdown() + "\n")


def table(results: dict[str, Any]) -> Table:
    """A row per plan and recovery: AP and AP50 of boxes and, where there are, masks or keypoints."""
    cells, settings = results["cells"], results["settings"]
    kinds = list(cells[CONTROL]["metrics"])
    header = ["Plan", "Recovery", "GMACs", *(f"{kind} {measure}" for kind in kinds for measure in ("AP", "AP50"))]
    rows = []
    plans = list(dict.fromkeys(name.partition(": ")[0] for name in cells))
    ordered = (f"{plan}: {variant}" if variant else plan for plan in plans for variant in ("", *VARIANTS))
    for name, cell in ((name, cells[name]) for name in ordered if name in cells):
        plan, _, variant = name.partition(": ")
        macs = f"{cell['macs'] / 1e9:.2f}" if "macs" in cell else "-"
        scores = [f"{cell['metrics'][kind][measure]:.3f}" for kind in kinds for measure in ("AP", "AP50")]
        rows.append((plan, variant or "-", macs, *scores, f"{cell['compress_s']:.0f}" if "compress_s" in cell else "-"))
    caption = (
        f"Before any fine-tuning: {cells[CONTROL]['images']} val images; refit on {settings['refit_images']}, "
        f"re-estimation on {settings['reestimate_images']} training images without their labels"
    )
    return Table((*header, "compress s"), tuple(rows), caption)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

"""The paper's Table I with this code: VGG-16-BN on CIFAR-10 with about 77, 88, 96 and 99 % fewer MACs.

Each plan is compressed, refitted layer by layer on unlabelled images (the paper does not do that; --refit-images 0
leaves it out), gets new BatchNorm statistics and is fine-tuned for the same number of steps, once with distillation
from the dense model and once on the labels alone (--no-labels-alone leaves that out). Because a dense model that has
not been trained to the end gains from any further training, the dense model is fine-tuned alike as a control
(--no-control leaves it out). Each cell records its seconds and is written when it is done; a fine-tuning that was
interrupted goes on where its state was saved: run the same command again.

    python benchmarks/table1_cifar.py --model runs/vgg16/last.safetensors --data runs/cifar
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.lib.cells import PLANS, RESULTS, ResultCells, page, run, tabulate
from benchmarks.lib.classifier_recovery import CONTROL, Recovery, RecoverySettings, Teacher, fine_tuning, percent
from benchmarks.lib.paper_tables import DENSE_TOP1, TABLE_I
from norton_deploy.compression.calibration import make_probes
from norton_deploy.compression.compress import compress_with_kept
from norton_deploy.compression.refit import refit
from norton_deploy.data.image_folder import read_images
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.report import Table

DISTILLED = ", distilled"
PROBE_BATCH = 200
NOTES = f"""\
A drop is in points below the dense model's own top-1 (the paper's: below its {DENSE_TOP1} %); a negative drop is a \
gain. Paper: Table I, with its own baseline and recipe. CIFAR-10 here is not the \
original but coded as JPEG (quality 75, colours at half the resolution)."""
CONTROL_NOTE = """\
 The control's drop shows what the fine-tuning alone does to the dense model: a fair drop is the difference to it."""
NO_CONTROL_NOTE = """\
 The dense model has not been fine-tuned alike (yet): part of what a compressed model regains is further training."""


@dataclass(frozen=True, kw_only=True)
class Settings(RecoverySettings):
    """Settings of benchmarks/table1_cifar.py."""

    runs: Path = Path("runs/table1")
    """Folder for the fine-tuning runs, which hold the checkpoints; an interrupted one is continued."""
    plans: tuple[Path, ...] = tuple(PLANS / f"{name}.yaml" for name in TABLE_I)
    """Plans to measure."""
    steps: int = 2000
    """Optimizer steps of each fine-tuning, the same for all."""
    distillation_weight: float = 0.7
    """Weight of the dense model's scores in the distilled runs; the labels have the rest."""
    temperature: float = 4.0
    """Temperature of the distillation."""
    refit_images: int = 2000
    """Refit the layers by least squares on so many unlabelled training images before fine-tuning; 0: do not."""
    labels_alone: bool = True
    """Fine-tune on the labels alone too."""
    control: bool = True
    """Fine-tune the dense model alike."""
    out: Path = RESULTS / "table1_cifar.json"
    """Results file; a Markdown table is written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    recovery = Recovery(settings)
    key = {name: getattr(settings, name) for name in ("distillation_weight", "temperature", "refit_images")}
    results = ResultCells(settings.out, recovery.identity() | key, report)
    results.measure("dense", lambda: {**recovery.complexity(recovery.dense), "top1": recovery.top1(recovery.dense)})
    for path in settings.plans:
        plan = CompressionPlan.load(path)
        start = cache(partial(compressed, recovery, settings, plan))
        for name, teacher in cells_of(path.stem, settings).items():
            cell = results.measure(name, partial(measure_plan, recovery, start, plan, name, teacher))
            if cell["plan"] != plan.to_dict():
                raise UserError(f"{settings.out}: cell '{name}' is of another plan than {path}; choose another --out")
    return results.measure_all({CONTROL: recovery.control} if settings.control else {})


def report(results: ResultCells) -> str:
    """The table of the cells so far."""
    note = CONTROL_NOTE if CONTROL in results.cells else NO_CONTROL_NOTE
    return page(level_table(results.cells, results.settings), NOTES + note)


def cells_of(stem: str, settings: Settings) -> dict[str, Teacher | None]:
    """The cells of a plan: on the labels if asked, and with the dense model as teacher."""
    alone: dict[str, Teacher | None] = {stem: None} if settings.labels_alone else {}
    return alone | {f"{stem}{DISTILLED}": Teacher(settings.model, settings.distillation_weight, settings.temperature)}


def compressed(recovery: Recovery, settings: Settings, plan: CompressionPlan) -> tuple[nn.Module, dict[str, Any]]:
    """The dense model compressed by the plan and refitted if asked, and what that took."""
    found = compress_with_kept(recovery.dense, plan, seed=settings.seed)
    if not settings.refit_images:
        return found.model, {}
    figures = {"top1_before_refit": recovery.top1(found.model)}
    images = read_images(settings.data / "train", settings.refit_images)
    started = time.perf_counter()
    probes = list(make_probes(recovery.dense, images, recovery.settings, batch=PROBE_BATCH))
    refit(found.model, recovery.dense, found.kept, probes, seed=settings.seed)
    return found.model, {**figures, "refit_s": round(time.perf_counter() - started, 1)}


def measure_plan(
    recovery: Recovery,
    start: Callable[[], tuple[nn.Module, dict[str, Any]]],
    plan: CompressionPlan,
    name: str,
    teacher: Teacher | None,
) -> dict[str, Any]:
    """One cell: what `compressed` gave, recovered."""
    small, figures = start()
    return {"plan": plan.to_dict(), **figures, **recovery.measure(copy.deepcopy(small), plan, name, teacher=teacher)}


def level_table(cells: Mapping[str, dict[str, Any]], settings: dict[str, Any]) -> Table:
    """One row a plan: what is saved, top-1 and the drop without and with distillation, the paper's drop."""
    dense = cells["dense"]["top1"]
    plans = dict.fromkeys(name.removesuffix(DISTILLED) for name in cells if name not in ("dense", CONTROL))
    ways = {name: (cells.get(name), cells.get(name + DISTILLED)) for name in plans}
    any_of = {name: distilled or alone or {} for name, (alone, distilled) in ways.items()}
    any_of |= {name: cells[name] for name in ("dense", CONTROL) if name in cells}
    ways |= {"dense": ({"top1_fine_tuned": dense}, None), CONTROL: (cells.get(CONTROL), None)}
    rows = [name for name in ("dense", CONTROL) if name in cells]
    rows += sorted(plans, key=lambda name: -any_of[name]["macs"])

    def tuned(way: int) -> Callable[[str], str]:
        return lambda name: "-" if (cell := ways[name][way]) is None else percent(cell["top1_fine_tuned"])

    def drop(way: int) -> Callable[[str], str]:
        def text(name: str) -> str:
            top1 = (ways[name][way] or {}).get("top1_fine_tuned")
            return "-" if top1 is None else f"{100 * (dense - top1):.2f}"

        return text

    def size(key: str) -> Callable[[str], str]:
        return lambda name: f"{any_of[name][key] / 1e6:.2f}M ({any_of[name][f'{key}_reduction_percent']:.1f})"

    def before(key: str) -> Callable[[str], str]:
        return lambda name: percent(any_of[name][key]) if key in any_of[name] else "-"

    return tabulate(
        f"{settings['architecture']} on {settings['test_images']} images, fine-tuned for {settings['steps']} steps "
        f"at {settings['lr']:g}, refitted on {settings['refit_images']} unlabelled images; {fine_tuning(settings)}",
        rows,
        {
            "Plan": str,
            "MACs (CR %)": size("macs"),
            "Params (CR %)": size("params"),
            "Before refit %": before("top1_before_refit"),
            "Compressed %": before("top1_compressed"),
            "BatchNorm re-estimated %": before("top1_reestimated"),
            "Fine-tuned %": tuned(0),
            "Drop": drop(0),
            "Distilled %": tuned(1),
            "Drop, distilled": drop(1),
            "Drop, paper": lambda name: f"{DENSE_TOP1 - TABLE_I[name].top1:.2f}" if name in TABLE_I else "-",
        },
    )


if __name__ == "__main__":
    run(Settings, main)

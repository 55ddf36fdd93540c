"""What a detector should imitate: a compressed one fine-tuned in equally many steps with each of --distill's values.

All runs of a seed start from the same compressed and refitted detector, see the same images and differ in what they
imitate of the dense one: nothing (the control), the pyramid, the heads' answers, or both. Finished runs stay, an
interrupted one goes on: run the same command again.

    python benchmarks/distillation.py --start runs/pareto/mixed-4/last.safetensors \
        --teacher runs/mask/last.safetensors --data runs/data --precision bf16
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import get_args

from benchmarks.lib.cells import RESULTS, Cell, ResultCells, page, run, settings_of, tabulate
from benchmarks.lib.detector_tuning import Precision, average_precision, finetuned, task_of
from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.files import sha256_of
from norton_deploy.structures import Task
from norton_deploy.training.detector_training import Distill

CONTROL = "nothing"
IMITATIONS = (CONTROL, *get_args(Distill))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of benchmarks/distillation.py."""

    start: Path
    """Compressed detector (.safetensors)."""
    teacher: Path
    """Dense detector that it was compressed from."""
    data: Path
    """Dataset in COCO's layout that the dense one was trained on."""
    steps: int = 300
    """Steps of each fine-tuning."""
    lr: float = 0.0015
    """Peak learning rate of these steps."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the order of images."""
    val_images: int = 500
    """Evaluate on the first so many images of val."""
    precision: Precision = "no"
    """Precision of the training; evaluation is in float32."""
    work: Path = Path("runs/distillation")
    """Folder for the runs."""
    out: Path = RESULTS / "distillation.json"
    """Results; a table is written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing, one seed of all imitations after the other."""
    task = task_of(load_checkpoint(settings.start), settings.start)
    digests = {f"{name}_sha256": sha256_of(getattr(settings, name)) for name in ("start", "teacher")}
    key = {**settings_of(settings, "start", "teacher", "data", "seeds"), **digests, "task": task}
    results = ResultCells(settings.out, key, report)
    for name in ("teacher", "start"):
        results.measure(
            name, partial(average_precision, getattr(settings, name), task, settings.data, settings.val_images)
        )
    cells = [(what, seed) for seed in settings.seeds for what in IMITATIONS]
    return results.measure_all(
        {f"{what}, seed {seed}": partial(measure, settings, task, what, seed) for what, seed in cells}
    )


def measure(settings: Settings, task: Task, what: str, seed: int) -> Cell:
    """AP after the last step."""
    imitation = {} if what == CONTROL else {"teacher": settings.teacher, "distill": what}
    tuned = finetuned(
        settings.start, task, settings.data, settings.work / f"{what}-{seed}", steps=settings.steps, lr=settings.lr,
        seed=seed, precision=settings.precision, **imitation,
    )  # fmt: skip
    return {"imitated": what, "seed": seed, **average_precision(tuned, task, settings.data, settings.val_images)}


def report(results: ResultCells) -> str:
    """A row an imitation: AP of every kind, and what it gains over the control of the same seed."""
    cells, settings = results.cells, results.settings
    of_imitation: dict[str, dict[int, Cell]] = {}
    for cell in cells.values():
        if "imitated" in cell:
            of_imitation.setdefault(cell["imitated"], {})[cell["seed"]] = cell["metrics"]

    def ap(what: str, kind: str) -> str:
        return f"{mean(metrics[kind]['AP'] for metrics in of_imitation[what].values()):.4f}"

    def gain(what: str, kind: str) -> str:
        control = of_imitation.get(CONTROL, {})
        gains = [
            metrics[kind]["AP"] - control[seed][kind]["AP"]
            for seed, metrics in of_imitation[what].items()
            if seed in control
        ]
        return f"{mean(gains):+.4f} ({', '.join(f'{each:+.4f}' for each in gains)})" if gains else "-"

    kinds = list(cells["teacher"]["metrics"]) if "teacher" in cells else []
    columns: dict[str, Callable[[str], str]] = {"Imitated": str, "Seeds": lambda what: str(len(of_imitation[what]))}
    for kind in kinds:
        columns[f"{kind} AP"] = partial(ap, kind=kind)
        columns[f"{kind}: against nothing (each seed)"] = partial(gain, kind=kind)
    known = ", ".join(
        f"{name}: " + ", ".join(f"{kind} AP {cells[name]['metrics'][kind]['AP']:.4f}" for kind in kinds)
        for name in ("teacher", "start")
        if name in cells
    )
    caption = f"{settings['task']} detector after {settings['steps']} steps, by what it imitates; {known}"
    return page(tabulate(caption, of_imitation, columns))


if __name__ == "__main__":
    run(Settings, main)

"""The paper's Tables I and IV on one GPU in some minutes: VGG-16-BN on CIFAR-10, trained, compressed, fine-tuned.

All images lie on the GPU and a step is the replay of a recorded graph, so that
an epoch costs what its convolutions cost. As the authors do, the plans that decompose and prune are fine-tuned twice,
after decomposing and after pruning; the first stage is the plan of 88 %. Every cell gets a share of the seconds that
are left and trains for as many epochs as fit into it, at most --epochs; a cell is written when it is done, an error is
written in its place and tried again by the next run, and cells for which no time is left are left to it too.

    mkdir cifar && tar xf cifar10.tar.xz -C cifar    # train/CLASS/*, test/CLASS/*; or CIFAR-10's binary version
    python benchmarks/cifar_gpu.py --data cifar --state runs/cifar_gpu --budget 330
"""

import copy
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, page, run
from benchmarks.lib.cifar_experiment import (
    SMOOTHING,
    Experiment,
    ExperimentSettings,
    Recipe,
    load_state,
    save_state,
)
from benchmarks.lib.paper_tables import DENSE_TOP1, TABLE_I, TABLE_IV
from benchmarks.lib.resident_training import use_gpu_forms
from benchmarks.lib.rival_choices import choose_living_by_angles
from norton_deploy.compression.compress import compress
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.errors import UserError
from norton_deploy.method.cp import layer_nmse
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.report import Table

DECOMPOSED = "vgg16_88"  # rank 1, not pruned: the first stage of those that are
CHANCE = 1.2  # times the share of one class: a network that is not above it after training has learnt nothing
MINIMUM_S = 2.0  # a cell that would get less is left to the next run
NOTES = f"""\
Top-1 on the 10,000 test images after the last epoch, in float32; "best epoch" is the best of all epochs on the same \
test images (in mixed precision), which is how the paper's code chooses and flatters. A drop is in points below the \
dense model of the same column; a negative one is a gain. Paper: its Tables I and IV, dense {DENSE_TOP1} %, \
400 epochs a stage. Epochs are those of the stages one after another. CIFAR-10 here is not the original but coded as \
JPEG of quality 75 with colours at half the resolution, in training and test images alike. That costs accuracy, how \
much was not measured: compare drops, not accuracies. Compressed layers ran as the one \
convolution that they equal. A second seed is one of order and augmentation in the last stage."""


@dataclass(frozen=True, kw_only=True)
class Settings(ExperimentSettings):
    """Settings of benchmarks/cifar_gpu.py."""

    out: Path = RESULTS / "cifar_gpu.json"
    """Results file; a Markdown table is written beside it."""
    budget: float = 330.0
    """Seconds in all."""


RECIPE = Recipe()
"""Chosen before any of it was measured: a teacher trained with smoothed labels is said to teach best unsoftened
(Chandrasegaran et al., ICML 2022), and decay of three factors switches filters off."""
ABLATION = {
    "labels alone": Recipe(weight=0),
    "distilled, T = 1": RECIPE,
    "distilled, T = 4": Recipe(temperature=4.0),
    "distilled, T = 1, factors decayed": Recipe(factor_decay=True),
    "distilled, standardised, T = 2": Recipe(temperature=2.0, standardised=True),
}


def measure_dense(experiment: Experiment, seconds: float, epochs: int | None) -> Cell:
    """Train the dense model."""
    model, figures = experiment.fine_tune(experiment.skeleton, seconds, epochs, recipe=None)
    experiment.models["dense"] = model
    save_state(model, experiment.settings.state, "dense")
    return {"macs": experiment.before.macs, "params": experiment.before.params, **figures}


def measure_level(
    experiment: Experiment, name: str, recipe: Recipe, seconds: float, epochs: int | None, **how: Any
) -> Cell:
    """A plan of Table I: decomposed, or pruned from what DECOMPOSED has become; then fine-tuned."""
    plan = CompressionPlan.load(PLANS / f"{name}.yaml")
    if plan.keep:
        start = compress(
            copy.deepcopy(experiment.models[DECOMPOSED]).cpu(), replace(plan, ranks={}), choose=choose_living_by_angles
        )
    else:
        start = experiment.decomposed(next(iter(plan.ranks.values())))
    compressed = experiment.top1(use_gpu_forms(copy.deepcopy(start).to(experiment.device)))
    model, figures = experiment.fine_tune(start, seconds, epochs, recipe=recipe, **how)
    if name == DECOMPOSED and not how:
        experiment.models[name] = model
        save_state(model, experiment.settings.state, name)
    return {"plan": plan.to_dict(), **experiment.size(plan), "top1_compressed": compressed, **figures}


def measure_rank(experiment: Experiment, rank: int, seconds: float, epochs: int | None) -> Cell:
    """A row of Table IV: errors, top-1 as decomposed and after a short fine-tuning on labels and scores."""
    small = experiment.decomposed(rank)
    errors, energies = [], []
    for name in experiment.layers:
        block, conv = small.get_submodule(name), experiment.models["dense"].get_submodule(name)
        assert isinstance(block, CPDBlock) and isinstance(conv, nn.Conv2d)
        weight = conv.weight.detach().cpu()
        errors.append(layer_nmse(weight, block.factors()))
        energies.append(float(weight.double().square().sum()))
    total = sum(error * energy for error, energy in zip(errors, energies, strict=True)) / sum(energies)
    compressed = experiment.top1(use_gpu_forms(copy.deepcopy(small).to(experiment.device)))
    _, figures = experiment.fine_tune(small, seconds, epochs, recipe=RECIPE, short=True)
    nmse = {"nmse_mean": sum(errors) / len(errors), "nmse_total": total}
    return {**experiment.size(experiment.plan(rank)), **nmse, "top1_compressed": compressed, **figures}


@dataclass(frozen=True)
class PlannedCell:
    """Attributes: weight in sharing the time; what measures it, (seconds, epochs or None) -> cell; a cell that it is
    compared with, whose epochs it takes over and whose time it must have."""

    weight: float
    measure: Callable[[float, int | None], Cell]
    like: str | None = None


def planned_cells(experiment: Experiment) -> dict[str, PlannedCell]:
    """All cells, the most telling first."""
    smoke = experiment.settings.smoke
    level, rank_row = partial(measure_level, experiment), partial(measure_rank, experiment)
    cells = {"dense": PlannedCell(32, partial(measure_dense, experiment))}
    for name, weight in ((DECOMPOSED, 16), ("vgg16_99", 9), ("vgg16_96", 9), ("vgg16_77", 15))[: 2 if smoke else None]:
        cells[name] = PlannedCell(weight, partial(level, name, RECIPE))
    first = None
    for how, recipe in list(ABLATION.items())[-1 if smoke else 0 :]:
        name = f"vgg16_99, {how}"
        cells[name] = PlannedCell(1.5, partial(level, "vgg16_99", recipe, short=True), first)
        first = first or name
    for rank in (1,) if smoke else TABLE_IV:
        cells[f"rank {rank}"] = PlannedCell(2, partial(rank_row, rank), None if rank == 1 else "rank 1")
    for name in ("vgg16_99",) if smoke else ("vgg16_99", "vgg16_96", "vgg16_88", "vgg16_77"):
        again = partial(level, name, RECIPE, seed=experiment.settings.seed + 1)
        cells[f"{name}, second seed"] = PlannedCell(0, again, name)
    return cells


def main(settings: Settings) -> None:
    """Run the benchmark."""
    started = time.perf_counter()
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # the rest is for who launches the GPU's work
    experiment = Experiment(settings)
    print(f"images read after {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    identity = {
        "train_images": len(experiment.train),
        "test_images": len(experiment.test),
        "seed": settings.seed,
        "smoothing": SMOOTHING,
        "recipe": vars(RECIPE),
        "most_epochs": settings.epochs,
    }
    results = ResultCells(settings.out, identity, report)
    for name in [name for name, cell in results.cells.items() if "error" in cell]:
        del results.cells[name]
    for name, plan in (("dense", None), (DECOMPOSED, experiment.plan(1))):
        if name in results.cells and not load_state(experiment, name, plan):
            results.cells.clear() if name == "dense" else results.cells.pop(name)
    if "dense" in results.cells:
        experiment.decompose(TABLE_IV)
    cells = planned_cells(experiment)
    for name, cell in cells.items():
        if name in results.cells:
            continue
        left = settings.budget - (time.perf_counter() - started)
        epochs = None
        if cell.like is None:
            weights = [other.weight for key, other in cells.items() if key not in results.cells]
            seconds = left * cell.weight / sum(weights)
        else:
            model = results.cells.get(cell.like, {})
            seconds, epochs = left, model.get("epochs")
            if epochs is None or model["seconds"] > left:
                continue
        if seconds < MINIMUM_S and not settings.smoke:
            continue
        chance = 0.0 if settings.smoke else CHANCE / len(experiment.train.classes)
        measured = results.measure(name, partial(guarded, cell.measure, seconds, epochs, chance))
        print({key: value for key, value in measured.items() if key not in ("plan", "provenance")}, file=sys.stderr)
        if name == "dense":
            if "error" in measured:
                raise UserError(f"the dense model: {measured['error']}")
            experiment.decompose((1,) if settings.smoke else TABLE_IV)
    experiment.close()


def report(results: ResultCells) -> str:
    """All tables of the cells so far, and which failed; an error of the dense model leaves nothing to compare with."""
    dense = results.cells.get("dense", {})
    failed = [f"- {name}: {cell['error']}" for name, cell in results.cells.items() if "error" in cell]
    lines = ["Failed, to be run again:\n\n" + "\n".join(failed)] if failed else []
    return page(*(tables(results.cells) if "epochs" in dense else []), *lines, NOTES)


def guarded(
    measure: Callable[[float, int | None], Cell], seconds: float, epochs: int | None, chance: float = 0.0
) -> Cell:
    """A cell, or the error in its place: the others go on. A top-1 (0..1) of at most `chance` is one too."""
    try:
        cell = measure(seconds, epochs)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    if cell["top1"] <= chance:
        return {"error": f"stayed at chance: top-1 {100 * cell['top1']:.2f} % after training", "figures": cell}
    return cell


def tables(cells: dict[str, Cell]) -> list[Table]:
    """Table I with the ablation and the second seed, and Table IV, of the cells so far."""
    dense = cells["dense"]
    done = {name: cell for name, cell in cells.items() if "error" not in cell}
    levels: list[tuple[str, ...]] = []
    for name, cell in done.items():
        if name.startswith("rank"):
            continue
        plan = name.partition(",")[0]
        stages = [dense["epochs"]] if name == "dense" else [cell["epochs"]]
        if cell.get("plan", {}).get("keep"):
            stages.insert(0, cells[DECOMPOSED]["epochs"])
        paper = f"{DENSE_TOP1 - TABLE_I[plan].top1:.2f}" if plan in TABLE_I else "-"
        best = f"{100 * cell['top1_best_epoch']:.2f} ({points(dense['top1_best_epoch'] - cell['top1_best_epoch'])})"
        started = f"{100 * cell['top1_compressed']:.2f}" if "top1_compressed" in cell else "-"
        accuracy = f"{100 * cell['top1']:.2f}", points(dense["top1"] - cell["top1"])
        levels.append((name, *size(cell), " + ".join(map(str, stages)), started, *accuracy, paper, best))
    header = (
        "Model",
        "MACs (CR %)",
        "Params (CR %)",
        "Epochs",
        "Before fine-tuning %",
        "Top-1 %",
        "Drop",
        "Drop, paper",
    )
    ranks = []
    for name, cell in done.items():
        if name.startswith("rank"):
            *_, nmse, without, tuned = TABLE_IV[int(name.split()[1])]
            row = (f"{cell['nmse_mean']:.4f} / {cell['nmse_total']:.4f} ({nmse:.4f})", str(cell["epochs"]))
            accuracy = f"{100 * cell['top1_compressed']:.2f} ({without:.2f})", f"{100 * cell['top1']:.2f} ({tuned:.2f})"
            ranks.append((name, *size(cell), *row, *accuracy))
    rank_header = ("Rank", "MACs (CR %)", "Params (CR %)", "NMSE mean / total", "Epochs", "As decomposed %", "Top-1 %")
    return [
        Table((*header, "Best epoch % (drop)"), tuple(levels), "Table I"),
        Table(rank_header, tuple(ranks), "Table IV, the paper's figures in brackets"),
    ]


def points(drop: float) -> str:
    """0.0123 -> 1.23."""
    return f"{100 * drop:.2f}"


def size(cell: Cell) -> tuple[str, str]:
    """MACs and parameters with their reductions."""
    reductions = cell.get("macs_reduction_percent", 0.0), cell.get("params_reduction_percent", 0.0)
    return f"{cell['macs'] / 1e6:.2f}M ({reductions[0]:.1f})", f"{cell['params'] / 1e6:.2f}M ({reductions[1]:.1f})"


if __name__ == "__main__":
    run(Settings, main)

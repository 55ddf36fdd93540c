"""The paper's two comparisons as numbers, on one trained network and at equal MACs.

1. Figure 1: the filters' CPD (the paper's) against CPD of the whole layer with four factors, CPD of the reshaped layer
   with three, and Tucker-2. Every layer of a rival gets the ranks whose MACs come closest from below to those of that
   layer at the given rank of the filters' CPD. NMSE, time to decompose, and top-1 as decomposed, with new BatchNorm
   statistics and after the same short fine-tuning.
2. Section II-B: Algorithm 1 on principal angles (PABS) against L1 norm, FPGM and random choice of the filters,
   decomposing before pruning against after it, all by one plan, with several seeds (of decomposition, data order and
   random choice).

A dense epoch of VGG-16-BN on CIFAR-10 (391 steps of 128) takes about 8 minutes on 2 cores: plan with 5 to 15 minutes a
cell of 200 steps (an estimate; each cell records its seconds); by default there are 8 and 24 cells. Each cell is
written when it is done and a fine-tuning that was interrupted goes on where its state was saved: run the same command
again.

    python benchmarks/rivals.py --model runs/vgg16/last.safetensors --data runs/cifar
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import torch
from torch import nn

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, page, run, tabulate
from benchmarks.lib.classifier_recovery import Recovery, RecoverySettings, fine_tuning, network_nmse, percent
from benchmarks.lib.rival_choices import choose_at_random, choose_by_geometric_median, choose_by_l1_norm
from benchmarks.lib.rival_layers import chain, chain_macs, map_sizes, ranks_within, replace_by_rivals
from norton_deploy.compression.compress import compress
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.method.cp import layer_nmse
from norton_deploy.method.filter_selection import FilterChoice, choose_by_angles
from norton_deploy.method.layer_factors import LAYER_FORMS, LayerFactors, LayerForm, decompose_layer
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.report import Table

Choice = Literal["PABS", "L1", "FPGM", "random"]
Order = Literal["decompose, prune", "prune, decompose"]
METHODS: dict[str, str] = {
    "filter": "filter CPD (the paper's)",
    "layer": "layer CPD, 4 factors",
    "reshaped": "reshaped CPD, 3 factors",
    "tucker2": "Tucker-2",
}
NOTES = """\
NMSE: plain mean over the layers / all squared errors over all squared weights. The decomposition's seconds are those \
of all layers on this machine, each method in this package's own implementation. The paper's Figure 1 has no figures; \
its Table I lists Lebedev et al. (layer CPD) with 93.07 % at 78 % fewer MACs and HALOC (low rank) with 93.16 % at \
86 %, against 94.11 % at 77 % and 93.84 % at 88 % of its own method, each by its own recipe. The paper does not \
compare PABS with other choices, or its order with the other one. Every CPD is the best of four starts. Filters that \
are pruned before they are decomposed have no factors yet: PABS means the angle between whole filters there. Spread: \
the lowest and the highest of the seeds."""


@dataclass(frozen=True, kw_only=True)
class Settings(RecoverySettings):
    """Settings of benchmarks/rivals.py."""

    runs: Path = Path("runs/rivals")
    """Folder for the fine-tuning runs; an interrupted one is continued."""
    steps: int = 200
    """Optimizer steps of each fine-tuning, the same for all."""
    ranks: tuple[int, ...] = (1, 3)
    """Ranks of the filters' CPD that set the MACs of comparison 1."""
    other_lr: float = 0.002
    """Comparison 1 is fine-tuned with this learning rate too: what one decomposition needs another may not bear."""
    plan: Path = PLANS / "vgg16_96.yaml"
    """Plan of comparison 2."""
    choices: tuple[Choice, ...] = get_args(Choice)
    """Choices of the filters."""
    orders: tuple[Order, ...] = get_args(Order)
    """Orders of the two steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of comparison 2; comparison 1 runs with --seed."""
    out: Path = RESULTS / "rivals.json"
    """Results file; Markdown tables are written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    recovery = Recovery(settings)
    plan = CompressionPlan.load(settings.plan)
    key = recovery.identity() | {"plan": plan.to_dict(), "other_lr": settings.other_lr}
    results = ResultCells(settings.out, key, report)
    results.measure("dense", lambda: {"top1": recovery.top1(recovery.dense)})
    for rank in settings.ranks:
        for method in METHODS:
            name = f"{method}, rank {rank}"
            results.measure(name, partial(measure_method, recovery, method, rank, name, settings.other_lr))
    for seed in settings.seeds:
        for order in settings.orders:
            for choice in settings.choices:
                name = f"{choice}, {order}, seed {seed}"
                results.measure(name, partial(measure_choice, recovery, plan, choice, order, seed, name))
    return results.measure_all({})


def report(results: ResultCells) -> str:
    """Both tables of the cells so far."""
    return page(method_table(results), choice_table(results.cells, results.settings), NOTES)


def measure_method(recovery: Recovery, method: str, rank: int, name: str, other_lr: float) -> dict[str, Any]:
    """One cell of comparison 1."""
    seed, dense = recovery.recovery.seed, recovery.dense
    convolutions = {n: layer for n, layer in dense.named_modules() if isinstance(layer, nn.Conv2d)}
    plan = CompressionPlan(recovery.settings.architecture, dict.fromkeys(convolutions, rank))
    started = time.perf_counter()
    if method == "filter":
        small = compress(dense, plan, seed=seed)
        seconds = time.perf_counter() - started
        blocks = {n: layer for n, layer in small.named_modules() if isinstance(layer, CPDBlock)}
        errors = {n: layer_nmse(convolutions[n].weight, block.factors()) for n, block in blocks.items()}
        figures = recovery.measure(small, plan, name, other_lr=other_lr)
        return {"decompose_s": round(seconds, 2), **network_nmse(dense, errors), **figures}
    kind: LayerForm = next(rival for rival in LAYER_FORMS if rival == method)
    ranks = rival_ranks(recovery, kind, rank)
    started = time.perf_counter()
    factors: dict[str, LayerFactors] = {
        n: decompose_layer(conv.weight, kind, ranks[n], seed=seed) for n, conv in convolutions.items()
    }
    seconds = time.perf_counter() - started
    errors = {n: layer_nmse(conv.weight, factors[n]) for n, conv in convolutions.items()}
    figures = recovery.measure(replace_by_rivals(dense, factors), None, name, other_lr=other_lr)
    return {"decompose_s": round(seconds, 2), "ranks": ranks, **network_nmse(dense, errors), **figures}


def measure_choice(
    recovery: Recovery, plan: CompressionPlan, choice: Choice, order: Order, seed: int, name: str
) -> dict[str, Any]:
    """One cell of comparison 2."""
    return recovery.measure(prune(recovery.dense, plan, choice, order, seed), plan, name, seed=seed)


def rival_ranks(recovery: Recovery, kind: LayerForm, rank: int) -> dict[str, tuple[int, ...]]:
    """Ranks of every convolution within the MACs of the filters' CPD at `rank`."""
    convolutions = {n: layer for n, layer in recovery.dense.named_modules() if isinstance(layer, nn.Conv2d)}
    found = {}
    for name, (input_size, output_size) in map_sizes(
        recovery.dense, convolutions, recovery.settings.image_size
    ).items():
        weight = convolutions[name].weight
        kernel = (weight.shape[2], weight.shape[3])
        budget = chain_macs(chain("filter", weight.shape[0], weight.shape[1], (rank,)), kernel, input_size, output_size)
        found[name] = ranks_within(kind, weight, budget, input_size, output_size)
    return found


def prune(dense: nn.Module, plan: CompressionPlan, choice: Choice, order: Order, seed: int) -> nn.Module:
    """The dense model compressed by the plan, its filters chosen by `choice`."""
    chosen: dict[Choice, FilterChoice] = {
        "PABS": choose_by_angles,
        "L1": choose_by_l1_norm,
        "FPGM": choose_by_geometric_median,
        "random": partial(choose_at_random, generator=torch.Generator().manual_seed(seed)),
    }
    if order == "decompose, prune":
        return compress(dense, plan, seed=seed, choose=chosen[choice])
    pruned = compress(dense, CompressionPlan(plan.architecture, {}, plan.keep), choose=chosen[choice])
    return compress(pruned, CompressionPlan(plan.architecture, plan.ranks), seed=seed)


def method_table(results: ResultCells) -> Table:
    """Comparison 1."""
    settings, cells = results.settings, results.cells
    named = [(name.partition(", rank "), cell) for name, cell in cells.items()]

    def top1(key: str) -> Any:
        return lambda row: percent(row[1][f"top1_{key}"])

    return tabulate(
        f"Decompositions at equal MACs; dense {percent(cells['dense']['top1'])} %; {fine_tuning(settings)}",
        [((method, rank), cell) for (method, separator, rank), cell in named if separator and method in METHODS],
        {
            "Decomposition": lambda row: METHODS[row[0][0]],
            "MACs": lambda row: f"{row[1]['macs'] / 1e6:.2f}M (rank {row[0][1]})",
            "Params": lambda row: f"{row[1]['params'] / 1e6:.2f}M",
            "NMSE mean / total": lambda row: f"{row[1]['nmse_mean']:.4f} / {row[1]['nmse_total']:.4f}",
            "Time to decompose (s)": lambda row: f"{row[1]['decompose_s']:.1f}",
            "As decomposed %": top1("compressed"),
            "BatchNorm re-estimated %": top1("reestimated"),
            f"{settings['steps']} steps at {settings['lr']} %": top1("fine_tuned"),
            f"{settings['steps']} steps at {settings['other_lr']} %": top1("fine_tuned_other_lr"),
        },
    )


def choice_table(cells: dict[str, Cell], settings: dict[str, Any]) -> Table:
    """Comparison 2: mean and spread over the seeds."""
    by_row: dict[tuple[str, str], list[Cell]] = {}
    for name, cell in cells.items():
        label, separator, _ = name.rpartition(", seed ")
        if separator:
            choice, _, order = label.partition(", ")
            by_row.setdefault((choice, order), []).append(cell)

    def top1(key: str) -> Any:
        return lambda row: mean_and_spread([cell[f"top1_{key}"] for cell in row[1]])

    return tabulate(
        "Choices of filters and order of the steps, one plan: mean (lowest to highest)",
        by_row.items(),
        {
            "Choice": lambda row: row[0][0],
            "Order": lambda row: row[0][1],
            "MACs": lambda row: f"{row[1][0]['macs'] / 1e6:.2f}M",
            "As compressed %": top1("compressed"),
            "BatchNorm re-estimated %": top1("reestimated"),
            f"Fine-tuned, {settings['steps']} steps %": top1("fine_tuned"),
            "Seeds": lambda row: str(len(row[1])),
        },
    )


def mean_and_spread(shares: list[float | None]) -> str:
    """Mean, and lowest to highest, in per cent."""
    values = [100 * share for share in shares if share is not None]
    if len(values) < len(shares):
        return f"{len(shares) - len(values)} of {len(shares)} diverged"
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    run(Settings, main)

"""The paper's Table IV with this code: what the rank of every convolution of VGG-16-BN costs and saves.

For each rank 1 to 8, nothing pruned: reduction of MACs and parameters, NMSE, top-1 as decomposed, with new BatchNorm
statistics, and after the same short fine-tuning of every rank. Each cell records its seconds and is written when it is
done; a fine-tuning that was interrupted goes on where its state was saved: run the same command again.

    python benchmarks/table4_rank.py --model runs/vgg16/last.safetensors --data runs/cifar
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from benchmarks.lib.cells import RESULTS, Cell, ResultCells, page, run, save_figure, tabulate
from benchmarks.lib.classifier_recovery import CONTROL, Recovery, RecoverySettings, fine_tuning, network_nmse, percent
from benchmarks.lib.paper_tables import DENSE_TOP1, TABLE_IV
from norton_deploy.compression.compress import compress
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.method.cp import layer_nmse
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.report import Table

NOTES = f"""\
In brackets: the paper's Table IV, from a dense model with {DENSE_TOP1} %. NMSE of this code: plain mean over the \
layers, and all squared errors over all squared weights; the paper does not say which its figure is. The paper has no \
column for re-estimated BatchNorm statistics and does not say how long it fine-tunes. CIFAR-10 here is not the \
original but coded as JPEG (quality 75, colours at half the resolution). The row "dense" shows what the same \
fine-tuning does to the dense model.

![accuracy and NMSE against rank](table4_rank.png)"""


@dataclass(frozen=True, kw_only=True)
class Settings(RecoverySettings):
    """Settings of benchmarks/table4_rank.py."""

    runs: Path = Path("runs/table4")
    """Folder for the fine-tuning runs; an interrupted one is continued."""
    ranks: tuple[int, ...] = tuple(TABLE_IV)
    """Ranks to measure."""
    out: Path = RESULTS / "table4_rank.json"
    """Results file; the table (.md) and the plot (.png) are written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    recovery = Recovery(settings)
    return ResultCells(settings.out, recovery.identity(), report).measure_all(
        {
            "dense": lambda: {"top1": recovery.top1(recovery.dense)},
            CONTROL: recovery.control,
            **{f"rank {rank}": partial(measure_rank, recovery, rank) for rank in settings.ranks},
        }
    )


def report(results: ResultCells) -> str:
    """The table of the cells so far; the plot is written beside it."""
    cells = {rank: results.cells[f"rank {rank}"] for rank in TABLE_IV if f"rank {rank}" in results.cells}
    plot(results.cells["dense"], cells, results.path.with_suffix(".png"))
    return page(rank_table(results, cells), NOTES)


def measure_rank(recovery: Recovery, rank: int) -> dict[str, float | None]:
    """One cell: every convolution at this rank."""
    convolutions = [name for name, layer in recovery.dense.named_modules() if isinstance(layer, nn.Conv2d)]
    plan = CompressionPlan(recovery.settings.architecture, dict.fromkeys(convolutions, rank))
    small = compress(recovery.dense, plan, seed=recovery.recovery.seed)
    errors = {}
    for name in convolutions:
        block, conv = small.get_submodule(name), recovery.dense.get_submodule(name)
        assert isinstance(block, CPDBlock) and isinstance(conv, nn.Conv2d)
        errors[name] = layer_nmse(conv.weight, block.factors())
    return {**network_nmse(recovery.dense, errors), **recovery.measure(small, plan, f"rank {rank}")}


def rank_table(results: ResultCells, cells: dict[int, Cell]) -> Table:
    """Table IV, the paper's figures in brackets."""
    settings, dense, control = results.settings, results.cells["dense"], results.cells.get(CONTROL, {})
    tuned = percent(control["top1_fine_tuned"]) if control else "-"
    tuned_title = f"Fine-tuned, {settings['steps']} steps at {settings['lr']:g} %"
    columns = {
        "Rank": lambda rank: str(rank),
        "MACs CR %": lambda rank: f"{cells[rank]['macs_reduction_percent']:.2f} ({TABLE_IV[rank].macs_cr:.2f})",
        "Params CR %": lambda rank: f"{cells[rank]['params_reduction_percent']:.2f} ({TABLE_IV[rank].params_cr:.2f})",
        "NMSE mean / total": lambda rank: (
            f"{cells[rank]['nmse_mean']:.4f} / {cells[rank]['nmse_total']:.4f} ({TABLE_IV[rank].nmse:.4f})"
        ),
        "As decomposed %": lambda rank: (
            f"{percent(cells[rank]['top1_compressed'])} ({TABLE_IV[rank].top1_decomposed:.2f})"
        ),
        "BatchNorm re-estimated %": lambda rank: percent(cells[rank]["top1_reestimated"]),
        tuned_title: lambda rank: f"{percent(cells[rank]['top1_fine_tuned'])} ({TABLE_IV[rank].top1_fine_tuned:.2f})",
    }
    caption = (
        f"{settings['architecture']}, dense {percent(dense['top1'])} % on {settings['test_images']} images; "
        f"{fine_tuning(settings)}"
    )
    table = tabulate(caption, cells, columns)
    first = ("dense", "0.00", "0.00", "0", f"{percent(dense['top1'])} ({DENSE_TOP1})", "-", tuned)
    return Table(table.header, (first, *table.rows), caption)


def plot(dense: dict[str, Any], cells: dict[int, dict[str, Any]], path: Path) -> None:
    """Accuracy and NMSE against rank, this code's solid and the paper's dashed."""
    ranks = list(cells)
    figure = Figure((11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    series = (
        ("top1_compressed", "as decomposed", "tab:red"),
        ("top1_reestimated", "BatchNorm re-estimated", "tab:orange"),
        ("top1_fine_tuned", "fine-tuned", "tab:blue"),
    )
    for key, label, colour in series:
        left.plot(ranks, [100 * (cells[rank][key] or 0) for rank in ranks], "o-", color=colour, label=label)
    for column, label, colour in (
        ("top1_decomposed", "paper, as decomposed", "tab:red"),
        ("top1_fine_tuned", "paper, fine-tuned", "tab:blue"),
    ):
        left.plot(
            ranks, [getattr(TABLE_IV[rank], column) for rank in ranks], "x--", color=colour, alpha=0.5, label=label
        )
    left.axhline(100 * dense["top1"], color="grey", linewidth=1, label="dense")
    left.set(xlabel="rank", ylabel="top-1 (%)", xticks=ranks, ylim=(0, 100))
    for key, label in (("nmse_mean", "mean over layers"), ("nmse_total", "total")):
        right.plot(ranks, [cells[rank][key] for rank in ranks], "o-", label=label)
    right.plot(ranks, [TABLE_IV[rank].nmse for rank in ranks], "x--", color="grey", label="paper")
    right.set(xlabel="rank", ylabel="NMSE", xticks=ranks, ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    run(Settings, main)

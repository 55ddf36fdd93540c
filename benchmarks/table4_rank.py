"""The paper's Table IV with this code: what the rank of every convolution of VGG-16-BN costs and saves.

For each rank 1 to 8, nothing pruned: reduction of MACs and parameters, NMSE, top-1 as decomposed, with new BatchNorm
statistics, and after the same short fine-tuning of every rank. Each cell records its seconds and is written when it is
done; a fine-tuning that was interrupted goes on where its state was saved: run the same command again.

    python benchmarks/table4_rank.py --model runs/vgg16/last.safetensors --data runs/cifar
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from torch import nn

from benchmarks.lib.recovery import Recovery, RecoverySettings, network_nmse, percent
from benchmarks.lib.result_cells import ResultCells
from norton_deploy.compression.compress import compress
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.method.cp import layer_nmse
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.tables import PRECISION_NAMES, Table

RESULTS = Path(__file__).parent / "results"
# Table IV: rank -> reduction of MACs and parameters (%), NMSE, top-1 without and with fine-tuning (%).
PAPER = {
    1: (88.03, 87.06, 0.6265, 10.00, 93.84),
    2: (76.44, 75.98, 0.4114, 10.00, 94.11),
    3: (64.85, 64.91, 0.2760, 68.37, 94.18),
    4: (53.27, 53.84, 0.1837, 88.30, 94.07),
    5: (41.69, 42.76, 0.1173, 92.44, 94.22),
    6: (30.10, 31.69, 0.0698, 93.45, 94.15),
    7: (18.51, 20.61, 0.0372, 93.90, 94.11),
    8: (6.93, 9.54, 0.0137, 94.03, 94.03),
}
PAPER_DENSE = 93.96
CONTROL = "dense, fine-tuned alike"
NOTES = f"""\
In brackets: the paper's Table IV, from a dense model with {PAPER_DENSE} %. NMSE of this code: plain mean over the \
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
    ranks: tuple[int, ...] = tuple(PAPER)
    """Ranks to measure."""
    out: Path = RESULTS / "table4_rank.json"
    """Results file; the table (.md) and the plot (.png) are written beside it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, argv, prog="table4_rank", description=__doc__ or "")
    recovery = Recovery(settings)
    results = ResultCells(settings.out, recovery.identity())
    results.measure("dense", lambda: {"top1": recovery.top1(recovery.dense)})
    results.measure(CONTROL, lambda: measure_control(recovery))
    for rank in settings.ranks:
        results.measure(f"rank {rank}", partial(measure_rank, recovery, rank))
        write(results)
    return 0


def write(results: ResultCells) -> None:
    """The table and the plot of the cells so far."""
    dense, control = results.cells["dense"], results.cells[CONTROL]
    cells = {rank: results.cells[f"rank {rank}"] for rank in PAPER if f"rank {rank}" in results.cells}
    results.write_markdown([rank_table(dense, control, cells, results.settings)], NOTES)
    plot(dense, cells, results.path.with_suffix(".png"))


def measure_control(recovery: Recovery) -> dict[str, float | None]:
    """The dense model after the same fine-tuning."""
    return {"top1_fine_tuned": recovery.fine_tune(copy.deepcopy(recovery.dense), None, CONTROL)}


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


def rank_table(
    dense: dict[str, Any], control: dict[str, Any], cells: dict[int, dict[str, Any]], settings: dict[str, Any]
) -> Table:
    """Table IV, the paper's figures in brackets."""
    tuned_dense = percent(control["top1_fine_tuned"])
    rows = [("dense", "0.00", "0.00", "0", f"{percent(dense['top1'])} ({PAPER_DENSE})", "-", tuned_dense)]
    for rank, cell in cells.items():
        macs, params, nmse, without, tuned = PAPER[rank]
        rows.append(
            (
                str(rank),
                f"{cell['macs_reduction_percent']:.2f} ({macs:.2f})",
                f"{cell['params_reduction_percent']:.2f} ({params:.2f})",
                f"{cell['nmse_mean']:.4f} / {cell['nmse_total']:.4f} ({nmse:.4f})",
                f"{percent(cell['top1_compressed'])} ({without:.2f})",
                f"{percent(cell['top1_reestimated'])}",
                f"{percent(cell['top1_fine_tuned'])} ({tuned:.2f})",
            )
        )
    header = ("Rank", "MACs CR %", "Params CR %", "NMSE mean / total", "As decomposed %", "BatchNorm re-estimated %")
    steps = f"Fine-tuned, {settings['steps']} steps at {settings['lr']:g} %"
    caption = (
        f"{settings['architecture']}, dense {100 * dense['top1']:.2f} % on {settings['test_images']} images; "
        f"precision of the fine-tuning: {PRECISION_NAMES[settings['precision']]}"
    )
    return Table((*header, steps), tuple(rows), caption)


def plot(dense: dict[str, Any], cells: dict[int, dict[str, Any]], path: Path) -> None:
    """Accuracy and NMSE against rank, this code's solid and the paper's dashed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = list(cells)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    series = (
        ("top1_compressed", "as decomposed", "tab:red"),
        ("top1_reestimated", "BatchNorm re-estimated", "tab:orange"),
        ("top1_fine_tuned", "fine-tuned", "tab:blue"),
    )
    for key, label, colour in series:
        left.plot(ranks, [100 * (cells[rank][key] or 0) for rank in ranks], "o-", color=colour, label=label)
    for column, label, colour in ((3, "paper, as decomposed", "tab:red"), (4, "paper, fine-tuned", "tab:blue")):
        left.plot(ranks, [PAPER[rank][column] for rank in ranks], "x--", color=colour, alpha=0.5, label=label)
    left.axhline(100 * dense["top1"], color="grey", linewidth=1, label="dense")
    left.set(xlabel="rank", ylabel="top-1 (%)", xticks=ranks, ylim=(0, 100))
    for key, label in (("nmse_mean", "mean over layers"), ("nmse_total", "total")):
        right.plot(ranks, [cells[rank][key] for rank in ranks], "o-", label=label)
    right.plot(ranks, [PAPER[rank][2] for rank in ranks], "x--", color="grey", label="paper")
    right.set(xlabel="rank", ylabel="NMSE", xticks=ranks, ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

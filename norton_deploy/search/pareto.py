"""The picture of a search: what speed costs, with the paper's uniform plan beside the planned one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.files import atomic_write
from norton_deploy.search.planner import Point


@dataclass(frozen=True)
class Mark:
    """One plan in the picture: dense cost / its cost, and its measured harm."""

    label: str
    ratio: float
    harm: float


def draw_pareto(path: Path, front: Sequence[Point], dense_cost: float, axis: str, marks: Sequence[Mark]) -> None:
    """Write a PNG: predicted harm along the front, and the measured harm of single plans.

    Args:
        path: the .png file.
        front: of `Planner.frontier`.
        dense_cost: cost of the dense model.
        axis: what dense cost / cost is called, for example "speed-up".
        marks: plans whose harm was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    axes.plot(
        [dense_cost / point.cost for point in front],
        [point.harm for point in front],
        "-o", color="0.5", markersize=3, label="planner's choices (predicted)",
    )  # fmt: skip
    for mark, symbol in zip(marks, "*DsP^v", strict=False):
        axes.plot([mark.ratio], [mark.harm], symbol, markersize=10, label=f"{mark.label} (measured harm)")
    axes.set_xlabel(f"predicted {axis} against the dense model")
    axes.set_ylabel("relative squared error at pyramid and heads")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")
    pyplot.close(figure)

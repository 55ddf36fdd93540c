"""The picture of a search: what speed costs, with the paper's uniform plan beside the planned one."""

from pathlib import Path
from typing import Any

from norton_deploy.files import atomic_write

AXES = {"macs": "reduction of MACs", "params": "reduction of parameters"}


def draw_pareto(path: Path, record: dict[str, Any]) -> None:
    """Write a PNG: predicted harm along the front, and the measured harm of single plans, on a logarithmic axis.

    A uniform plan is joined by a dotted line to the planner's plan at the same cost.

    Args:
        path: the .png file.
        record: of `plan_record`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), dpi=120)
    front = [point for point in record["frontier"] if point["predicted_harm"] > 0]
    axes.plot(
        [point["ratio"] for point in front], [point["predicted_harm"] for point in front],
        "-o", color="0.55", markersize=3, label="planner's choices, predicted harm",
    )  # fmt: skip
    chosen, *uniform = record["marks"]
    axes.plot(
        chosen["ratio"], chosen["measured_harm"], "*", color="C3", markersize=15, label="this plan, measured harm"
    )
    for mark, symbol, colour in zip(uniform, "DsPXv" * len(uniform), _COLOURS * len(uniform), strict=False):
        label = f"uniform plan {mark['label']}, measured harm"
        axes.plot(mark["ratio"], mark["measured_harm"], symbol, color=colour, markersize=8, label=label)
        axes.annotate(
            mark["label"],
            (mark["ratio"], mark["measured_harm"]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
        )
        planned = mark["planned_at_equal_cost"]
        if planned is not None:
            axes.plot(
                [mark["ratio"], planned["ratio"]], [mark["measured_harm"], planned["measured_harm"]],
                ":", color=colour, linewidth=1,
            )  # fmt: skip
            axes.plot(
                planned["ratio"], planned["measured_harm"], symbol, color=colour, markersize=8, fillstyle="none",
                label=f"planner at the cost of {mark['label']}, measured harm",
            )  # fmt: skip
    axes.set_xlabel(f"predicted {AXES.get(record['budget'].partition('=')[0], 'speed-up')} against the dense model")
    axes.set_ylabel("relative squared error at pyramid and heads")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")
    pyplot.close(figure)


_COLOURS = ("C0", "C2", "C1", "C4", "C5")

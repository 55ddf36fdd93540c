"""Charts as small SVG files whose text and lines take the colour of the page around them."""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from norton_deploy.evaluation.coco_metrics import CategoryScore, MeasureScore
from norton_deploy.files import atomic_write
from norton_deploy.inference.predictor import StageTiming

INK = "#010203"
"""Stands for the page's text colour while matplotlib draws."""
DENSE, SMALL, LOST, GAINED = "#8a8f98", "#1f83d6", "#d1495b", "#2a9d8f"
STAGE_COLOURS = ("#7a5fd0", "#2a9d8f", "#e9a23b", "#1f83d6", "#d1495b")
WIDTH_INCHES = 4.8
NAME_LETTERS = 24
SMOOTHED = 10
MOST_POINTS = 400

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a category may be called "$"
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def chart(path: Path, height: float) -> Iterator[Axes]:
    """Axes to draw on, 4.8 inches wide, that become a file, whole or not at all.

    Args:
        path: .svg, or .png on white.
    """
    kind = path.suffix[1:]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.stem}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has it
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=160)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(True)
        axes.set_axisbelow(True)
        yield axes
        drawn = io.BytesIO()
        undated = {"metadata": dict.fromkeys(("Creator", "Date", "Format", "Type"))} if kind == "svg" else {}
        figure.savefig(drawn, format=kind, transparent=kind == "svg", **undated)
    content = drawn.getvalue()
    if kind == "svg":
        content = content.replace(INK.encode(), b"currentColor")
    with atomic_write(path) as stream:
        stream.write(content)


def draw_categories(path: Path, pairs: Sequence[tuple[CategoryScore, CategoryScore]], names: tuple[str, str]) -> None:
    """AP of every category, dense and small joined by a line, the first pair at the top.

    Args:
        pairs: (dense, small) of categories with objects.
    """
    with chart(path, 0.9 + 0.3 * len(pairs)) as axes:
        rows = np.arange(len(pairs))
        before, after = (np.array([pair[side].ap for pair in pairs], float) for side in (0, 1))
        colours = [LOST if small < dense else GAINED for dense, small in zip(before, after, strict=True)]
        axes.hlines(rows, before, after, color=colours, linewidth=2.5, alpha=0.6)
        # the larger dots are seen where both are alike
        axes.plot(before, rows, "o", color=DENSE, markersize=9, label=names[0], clip_on=False)
        axes.plot(after, rows, "o", color=SMALL, markersize=6, label=names[1], clip_on=False)
        axes.set_yticks(rows, [_shortened(pair[0].name) for pair in pairs])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.set_xlim(0, min(1.0, 1.08 * max(before.max(), after.max(), 0.1)))
        axes.set_xlabel("AP")
        legend_above(axes)


def draw_precision_recall(path: Path, scores: Mapping[str, MeasureScore], overlap: str) -> None:
    """Precision over recall, the mean of the categories, at an overlap of 0.50 (full line) and 0.75 (dashed).

    Args:
        scores: name -> score, the dense model first.
        overlap: what 0.50 is of, IoU or OKS.
    """
    with chart(path, 3.6) as axes:
        for (name, score), colour in zip(scores.items(), (DENSE, SMALL), strict=True):
            for (least, curve), line in zip(score.precision.items(), ("-", "--"), strict=True):
                axes.plot(np.linspace(0, 1, len(curve)), curve, line, color=colour, label=f"{name}, {overlap} {least}")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("Recall")
        axes.set_ylabel("Precision")
        legend_above(axes)


def draw_stages(path: Path, stages_ms: Mapping[str, Mapping[str, float]]) -> None:
    """Where a frame's time goes: a stacked bar for every model.

    Args:
        stages_ms: model -> stage of `StageTiming` -> mean time.
    """
    stages = list(vars(StageTiming()))
    totals = {name: sum(stages.values()) for name, stages in stages_ms.items()}
    with chart(path, 1.35 + 0.45 * len(stages_ms)) as axes:
        starts = np.zeros(len(stages_ms))
        for stage, colour in zip(stages, STAGE_COLOURS, strict=True):
            times = np.array([own.get(stage, 0.0) for own in stages_ms.values()])
            axes.barh(range(len(times)), times, left=starts, color=colour, label=stage.removesuffix("_ms"), height=0.6)
            starts += times
        for row, total in enumerate(totals.values()):
            axes.annotate(f"{total:.0f} ms", (total, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(totals)), [_shortened(name) for name in totals])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(totals.values()))
        axes.set_xlabel("ms an image, means")
        axes.grid(False, axis="y")
        legend_above(axes, columns=3)


def draw_training(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The loss over the steps of a training run, as logged (400 lines at most) and smoothed.

    Args:
        records: of section "train", see `read_log`.
    """
    records = records[:: 1 + len(records) // MOST_POINTS]
    steps = np.array([record["step"] for record in records])
    losses = np.array([record["losses"]["total"] for record in records], float)
    with chart(path, 2.8) as axes:
        axes.plot(steps, losses, color=DENSE, linewidth=0.8, alpha=0.6, label="as logged")
        if len(losses) > SMOOTHED:
            smooth = np.convolve(losses, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
            axes.plot(steps[SMOOTHED - 1 :], smooth, color=SMALL, label=f"mean of {SMOOTHED} entries")
        axes.set_ylim(0, 1.05 * np.nanquantile(losses, 0.98) if len(losses) > SMOOTHED else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("Step")
        axes.set_ylabel("Loss")
        legend_above(axes)


def draw_learning(path: Path, points: Sequence[tuple[int, float]], dense: float | None) -> None:
    """AP over the steps of a training run, with the dense model's as a line.

    Args:
        points: (step, AP).
    """
    with chart(path, 2.8) as axes:
        axes.plot(*zip(*points, strict=True), "-o", color=SMALL, markersize=4, label="fine-tuned model")
        if dense is not None:
            axes.axhline(dense, color=DENSE, linestyle="--", label="dense model")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Step")
        axes.set_ylabel("AP")
        legend_above(axes)


def legend_above(axes: Axes, columns: int = 2) -> None:
    """Name what is drawn above the axes, where it covers nothing."""
    axes.figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.4)


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…"

"""The report of `benchmarks/whole_detector.py`: plans over whole detectors, measured end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lib.cells import Cell, ResultCells, save_figure, tabulate
from norton_deploy.reporting.detector_table import MODEL_NAMES
from norton_deploy.reporting.provenance import provenance_table
from norton_deploy.reporting.report import Block, Heading, Paragraph, Picture, Report, Table

SCALING = {
    "image side": "Faster R-CNN, image side in pixels",
    "detections": "Keypoint R-CNN, detections per image",
    "batch": "Faster R-CNN, images per call",
}
ONNX, EAGER = "ONNX Runtime", "torch eager"
METHOD = """\
Images of {image_size} pixels, {proposals} proposals and {detections} detections for every model, {rounds} rounds in \
which all models take turns; medians. Random weights with calibrated normalisation: the figures say nothing about AP. \
The sgemm share is the model's MACs per second over the machine's own rate for float32 matrix products, measured in \
the same run."""


def report(results: ResultCells) -> Report:
    """All measured cells and their plots, which are written beside the results."""
    settings, cells = results.settings, results.cells
    made = Report("Compression of whole detectors, measured end to end")
    made.blocks.append(Paragraph(METHOD.format(**{**settings, "image_size": tuple(settings["image_size"])})))
    for task, name in MODEL_NAMES.items():
        if task in cells:
            made.blocks += task_blocks(name, cells[task])
    for kind, title in SCALING.items():
        if rows := scaling_rows(cells, kind):
            made.blocks += [Heading(f"Growth: {title}"), scaling_table(title, rows)]
    made.blocks += [Picture(path, path.stem.replace("_", " ")) for path in draw_plots(cells, results.path)]
    first = next(iter(cells.values()))
    made.blocks += [Heading("Machine and versions"), provenance_table(first["provenance"])]
    return made


def task_blocks(name: str, cell: Cell) -> list[Block]:
    """Latency of every model, and the ratios to both dense baselines."""
    rows = [
        {"model": model, **latency, **cell["complexity"][model.partition(",")[0]]}
        for model, latency in cell["latency"].items()
    ]
    return [
        Heading(name),
        Paragraph(f"Images: {cell['images']}. sgemm: {cell['sgemm_gmacs_per_s']:.0f} GMAC/s."),
        tabulate(
            "One image, pixels to detections",
            rows,
            {
                "Model": lambda row: row["model"],
                "MACs": lambda row: f"{row['macs'] / 1e9:.1f}G",
                "Params": lambda row: f"{row['params'] / 1e6:.1f}M",
                "p50 ms": lambda row: f"{row['p50_ms']:.0f}",
                "IQR / p50": lambda row: f"{100 * row['spread']:.0f} %",
                "Detections": lambda row: f"{row['detections']:.0f}",
                "sgemm share": lambda row: f"{100 * row['sgemm_share']:.0f} %",
            },
        ),
        Table(
            ("Model", "Against", "Ratio"),
            tuple((row["candidate"], row["baseline"], row["verdict"]) for row in cell["speedup"]),
            "Median of the paired ratios, bootstrap interval",
        ),
    ]


def scaling_rows(cells: dict[str, Cell], kind: str) -> list[tuple[int, dict[str, float]]]:
    """(value, model -> ms per image) of one kind of scaling cell, by rising value."""
    found = [(int(name.rpartition(" ")[2]), cell["p50_ms"]) for name, cell in cells.items() if name.startswith(kind)]
    return sorted(found, key=lambda row: row[0])


def scaling_table(title: str, rows: list[tuple[int, dict[str, float]]]) -> Table:
    """ms per image of dense and plan, and their ratio."""
    plan = next(name for name in rows[0][1] if name != "dense")
    cells = tuple(
        (str(value), f"{ms['dense']:.0f}", f"{ms[plan]:.0f}", f"{ms['dense'] / ms[plan]:.2f}") for value, ms in rows
    )
    return Table((title, "dense ms", f"{plan} ms", "ratio"), cells, f"{ONNX}, ms per image")


def draw_plots(cells: dict[str, Cell], out: Path) -> list[Path]:
    """Write the plots beside `out` (latency of all models; growth of latency) and return their paths."""

    def panels(count: int) -> tuple[Figure, Any]:
        figure = Figure((4.5 * count, 4), dpi=120, layout="tight")
        return figure, figure.subplots(1, count, squeeze=False)[0]

    paths = []
    tasks = [task for task in MODEL_NAMES if task in cells]
    if tasks:
        figure, all_axes = panels(len(tasks))
        for axes, task in zip(all_axes, tasks, strict=True):
            latency = cells[task]["latency"]
            plans = [name.partition(",")[0] for name in latency if name.endswith(ONNX)]
            for shift, engine in ((-0.2, EAGER), (0.2, ONNX)):
                heights = [latency[f"{plan}, {engine}"]["p50_ms"] for plan in plans]
                bars = axes.bar([index + shift for index in range(len(plans))], heights, 0.38, label=engine)
                axes.bar_label(bars, fmt="%.0f", fontsize=8)
            axes.set_xticks(range(len(plans)), plans)
            axes.set(title=MODEL_NAMES[task], ylabel="ms per image")
            axes.legend()
        paths.append(save_figure(figure, out.with_name(f"{out.stem}_latency.png")))
    kinds = [kind for kind in SCALING if scaling_rows(cells, kind)]
    if kinds:
        figure, all_axes = panels(len(kinds))
        for axes, kind in zip(all_axes, kinds, strict=True):
            rows = scaling_rows(cells, kind)
            for name in rows[0][1]:
                axes.plot([value for value, _ in rows], [ms[name] for _, ms in rows], "-o", label=name)
            axes.set(xlabel=SCALING[kind], ylabel=f"ms per image, {ONNX}")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend()
        paths.append(save_figure(figure, out.with_name(f"{out.stem}_growth.png")))
    return paths

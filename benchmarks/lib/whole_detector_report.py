"""The report of `benchmarks/whole_detector.py`: plans over whole detectors, measured end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from norton_deploy.files import atomic_write
from norton_deploy.reporting.page import Block, Heading, Paragraph, Picture, Report
from norton_deploy.reporting.table3 import provenance_table
from norton_deploy.reporting.tables import MODEL_NAMES, Table

SCALING = {
    "image side": ("Faster R-CNN, image side in pixels", "box"),
    "detections": ("Keypoint R-CNN, detections per image", "keypoint"),
    "batch": ("Faster R-CNN, images per call", "box"),
}
ONNX, EAGER = "ONNX Runtime", "torch eager"


def whole_detector_report(results: dict[str, Any], pictures: list[Path]) -> Report:
    """All measured cells; see the benchmark for the form of `results`."""
    settings, cells = results["settings"], results["cells"]
    report = Report("Compression of whole detectors, measured end to end")
    report.blocks.append(
        Paragraph(
            f"Images of {settings['image_size']} pixels, {settings['proposals']} proposals and "
            f"{settings['detections']} detections for every model, {settings['rounds']} rounds in which all models "
            "take turns; medians. Random weights with calibrated normalisation: the figures say nothing about AP. "
            "The sgemm share is the model's MACs per second over the machine's own rate for float32 matrix products, "
            "measured in the same run."
        )
    )
    for task, name in MODEL_NAMES.items():
        if task in cells:
            report.blocks += task_blocks(name, cells[task])
    for kind, (title, _) in SCALING.items():
        rows = scaling_rows(cells, kind)
        if rows:
            report.blocks += [Heading(f"Growth: {title}"), rows_table(title, rows)]
    report.blocks += [Picture(path, path.stem.replace("_", " ")) for path in pictures]
    if cells:
        report.blocks += [
            Heading("Machine and versions"),
            provenance_table(next(iter(cells.values()))["provenance"]),
        ]
    return report


def task_blocks(name: str, cell: dict[str, Any]) -> list[Block]:
    """Latency of every model, and the ratios to both dense baselines."""
    rows = []
    for model, latency in cell["latency"].items():
        counted = cell["complexity"][model.partition(",")[0]]
        rows.append(
            (
                model,
                f"{counted['macs'] / 1e9:.1f}G",
                f"{counted['params'] / 1e6:.1f}M",
                f"{latency['p50_ms']:.0f}",
                f"{100 * latency['spread']:.0f} %",
                f"{latency['detections']:.0f}",
                f"{100 * latency['sgemm_share']:.0f} %",
            )
        )
    header = ("Model", "MACs", "Params", "p50 ms", "IQR / p50", "Detections", "sgemm share")
    ratios = tuple((row["candidate"], row["baseline"], row["verdict"]) for row in cell["speedup"])
    return [
        Heading(name),
        Paragraph(f"Images: {cell['images']}. sgemm: {cell['sgemm_gmacs_per_s']:.0f} GMAC/s."),
        Table(header, tuple(rows), "One image, pixels to detections"),
        Table(("Model", "Against", "Ratio"), ratios, "Median of the paired ratios, bootstrap interval"),
    ]


def scaling_rows(cells: dict[str, Any], kind: str) -> list[tuple[int, dict[str, float]]]:
    """(value, model -> ms per image) of one kind of scaling cell, by rising value."""
    found = [(int(name.rpartition(" ")[2]), cell["p50_ms"]) for name, cell in cells.items() if name.startswith(kind)]
    return sorted(found, key=lambda row: row[0])


def rows_table(title: str, rows: list[tuple[int, dict[str, float]]]) -> Table:
    """ms per image of dense and plan, and their ratio."""
    plan = next(name for name in rows[0][1] if name != "dense")
    cells = tuple(
        (str(value), f"{ms['dense']:.0f}", f"{ms[plan]:.0f}", f"{ms['dense'] / ms[plan]:.2f}") for value, ms in rows
    )
    return Table((title, "dense ms", f"{plan} ms", "ratio"), cells, f"{ONNX}, ms per image")


def draw_plots(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the plots beside `out` (latency of all models; growth of latency) and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = results["cells"]
    paths = []
    tasks = [task for task in MODEL_NAMES if task in cells]
    if tasks:
        figure, all_axes = pyplot.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 4), dpi=120, squeeze=False)
        for axes, task in zip(all_axes[0], tasks, strict=True):
            latency = cells[task]["latency"]
            plans = [name.partition(",")[0] for name in latency if name.endswith(ONNX)]
            for shift, engine in ((-0.2, EAGER), (0.2, ONNX)):
                heights = [latency[f"{plan}, {engine}"]["p50_ms"] for plan in plans]
                bars = axes.bar([index + shift for index in range(len(plans))], heights, 0.38, label=engine)
                axes.bar_label(bars, fmt="%.0f", fontsize=8)
            axes.set_xticks(range(len(plans)), plans)
            axes.set_title(MODEL_NAMES[task])
            axes.set_ylabel("ms per image")
            axes.legend()
        paths.append(_save(figure, out.with_name(f"{out.stem}_latency.png")))
    kinds = [kind for kind in SCALING if scaling_rows(cells, kind)]
    if kinds:
        figure, all_axes = pyplot.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 4), dpi=120, squeeze=False)
        for axes, kind in zip(all_axes[0], kinds, strict=True):
            rows = scaling_rows(cells, kind)
            for name in rows[0][1]:
                axes.plot([value for value, _ in rows], [ms[name] for _, ms in rows], "-o", label=name)
            axes.set_xlabel(SCALING[kind][0])
            axes.set_ylabel(f"ms per image, {ONNX}")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend()
        paths.append(_save(figure, out.with_name(f"{out.stem}_growth.png")))
    return paths


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")
    pyplot.close(figure)
    return path

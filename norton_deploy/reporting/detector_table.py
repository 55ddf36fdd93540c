"""The form of the paper's Table III, and its rows as they are printed."""

from collections.abc import Sequence
from dataclasses import dataclass

from norton_deploy.reporting.report import Table
from norton_deploy.structures import Task

MODEL_NAMES: dict[Task, str] = {"box": "FasterRCNN", "mask": "MaskRCNN", "keypoint": "KeypointRCNN"}


@dataclass(frozen=True)
class DetectorRow:
    """One line of a table in the form of Table III.

    Attributes:
        model: e.g. "FasterRCNN" or "NORTON".
        runs_on: engine and machine.
        macs, params: of one image and of the whole model.
        dense_macs, dense_params: of the dense model that it is compared with (CR is relative to them).
        fps: images per second of one-image calls.
        latency_ms: median end-to-end time, the paper's delta.
        ap, ar: Table III's AP and AR (0..1).

    What is None was not measured.
    """

    model: str
    runs_on: str
    macs: float | None
    params: float | None
    dense_macs: float | None
    dense_params: float | None
    fps: float | None
    latency_ms: float | None
    ap: float | None = None
    ar: float | None = None


# Table III of the paper as it is printed (its 34 for the keypoint parameters is 33.5 by its own figures).
PAPER_MACHINE = "paper, RTX 3060"
PAPER_ROWS: dict[Task, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "box": (
        ("FasterRCNN", PAPER_MACHINE, "0.37", "0.51", "134.85G (00)", "41.81M (00)", "12", "85"),
        ("NORTON", PAPER_MACHINE, "0.32", "0.48", "93.39G (31)", "22.01M (47)", "25", "41"),
    ),
    "mask": (
        ("MaskRCNN", PAPER_MACHINE, "0.34", "0.47", "134.85G (00)", "44.46M (00)", "9", "111"),
        ("NORTON", PAPER_MACHINE, "0.32", "0.46", "93.39G (31)", "24.65M (45)", "20", "50"),
    ),
    "keypoint": (
        ("KeypointRCNN", PAPER_MACHINE, "0.65", "0.77", "137.42G (00)", "59.19M (00)", "8", "125"),
        ("NORTON", PAPER_MACHINE, "0.63", "0.75", "95.97G (30)", "39.39M (34)", "17", "59"),
    ),
}


def detector_table(rows: Sequence[DetectorRow], caption: str, *, paper: Task | None = None) -> Table:
    """Table III's columns and what each line was measured on.

    Args:
        paper: adds the paper's two lines of this task, marked as the paper's.
    """
    header = ("Model", "Runs on", "AP", "AR", "MACs (CR)", "Params (CR)", "FPS", "Δ (ms)")
    quoted = () if paper is None else PAPER_ROWS[paper]
    return Table(header, (*(_cells(row) for row in rows), *quoted), caption)


def _cells(row: DetectorRow) -> tuple[str, ...]:
    return (
        row.model,
        row.runs_on,
        "-" if row.ap is None else f"{row.ap:.2f}",
        "-" if row.ar is None else f"{row.ar:.2f}",
        _count(row.macs, row.dense_macs, 1e9, "G"),
        _count(row.params, row.dense_params, 1e6, "M"),
        "-" if row.fps is None else f"{row.fps:.1f}" if row.fps < 10 else f"{row.fps:.0f}",
        "-" if row.latency_ms is None else f"{row.latency_ms:.0f}",
    )


def _count(value: float | None, dense: float | None, unit: float, letter: str) -> str:
    if value is None:
        return "-"
    return f"{value / unit:.2f}{letter}" + ("" if dense is None else f" ({reduction_percent(value, dense)})")


def reduction_percent(compressed: float, dense: float) -> str:
    """Table III's compression rate: per cent saved, two digits."""
    return f"{100 * (1 - compressed / dense):02.0f}"

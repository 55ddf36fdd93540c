"""Tables, and the form of the paper's Table III."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from norton_deploy.structures import Task

MODEL_NAMES: dict[Task, str] = {"box": "FasterRCNN", "mask": "MaskRCNN", "keypoint": "KeypointRCNN"}


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        header: column titles.
        rows: cells, as many per row as titles.
        caption: one line above the table, "" for none.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"table '{self.caption}': {len(self.header)} columns, but a row has {len(row)}")

    def to_markdown(self) -> str:
        """GitHub's pipe table."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{self.caption}\n\n{text}" if self.caption else text


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
        ap, ar: Table III's AP and AR (0..1), None when the weights were not evaluated.
    """

    model: str
    runs_on: str
    macs: float
    params: float
    dense_macs: float
    dense_params: float
    fps: float
    latency_ms: float
    ap: float | None = None
    ar: float | None = None


def detector_table(rows: Sequence[DetectorRow], caption: str) -> Table:
    """Table III's columns (and what each line was measured on)."""
    header = ("Model", "Runs on", "AP", "AR", "MACs (CR)", "Params (CR)", "FPS", "Δ (ms)")
    return Table(header, tuple(_cells(row) for row in rows), caption)


def _cells(row: DetectorRow) -> tuple[str, ...]:
    return (
        row.model,
        row.runs_on,
        "-" if row.ap is None else f"{row.ap:.2f}",
        "-" if row.ar is None else f"{row.ar:.2f}",
        f"{row.macs / 1e9:.2f}G ({reduction_percent(row.macs, row.dense_macs)})",
        f"{row.params / 1e6:.2f}M ({reduction_percent(row.params, row.dense_params)})",
        f"{row.fps:.1f}" if row.fps < 10 else f"{row.fps:.0f}",
        f"{row.latency_ms:.0f}",
    )


def reduction_percent(compressed: float, dense: float) -> str:
    """Table III's compression rate: per cent saved, two digits."""
    return f"{100 * (1 - compressed / dense):02.0f}"


def paper_rows(task: Task) -> tuple[DetectorRow, DetectorRow]:
    """Table III of the paper for one task, dense and NORTON, exactly as printed; not measured here."""
    where = "paper, RTX 3060"
    dense, norton = _PAPER[task]
    return (
        DetectorRow(f"{MODEL_NAMES[task]} (paper)", where, *_PAPER_DENSE[task], *_PAPER_DENSE[task], *dense),
        DetectorRow("NORTON (paper)", where, *_PAPER_NORTON[task], *_PAPER_DENSE[task], *norton),
    )


# Table III: MACs and parameters; then FPS, latency in ms, AP, AR of the dense model and of NORTON.
_PAPER_DENSE: dict[Task, tuple[float, float]] = {
    "box": (134.85e9, 41.81e6),
    "mask": (134.85e9, 44.46e6),
    "keypoint": (137.42e9, 59.19e6),
}
_PAPER_NORTON: dict[Task, tuple[float, float]] = {
    "box": (93.39e9, 22.01e6),
    "mask": (93.39e9, 24.65e6),
    "keypoint": (95.97e9, 39.39e6),
}
_PAPER: dict[Task, tuple[tuple[float, float, float, float], tuple[float, float, float, float]]] = {
    "box": ((12, 85, 0.37, 0.51), (25, 41, 0.32, 0.48)),
    "mask": ((9, 111, 0.34, 0.47), (20, 50, 0.32, 0.46)),
    "keypoint": ((8, 125, 0.65, 0.77), (17, 59, 0.63, 0.75)),
}

"""Tables, the form of the paper's Table III, and reports that come out as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from norton_deploy.errors import UserError
from norton_deploy.structures import Task

PRECISION_NAMES = {"no": "float32", "bf16": "mixed with bfloat16"}
"""A training's `precision` -> what tables call it."""
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
        rows: what was measured.
        caption: line above the table.
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


PICTURE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92rem; }
caption { caption-side: top; text-align: left; font-weight: 600; padding-bottom: 0.3rem; }
th, td { border: 1px solid #ccc; padding: 0.3rem 0.6rem; text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th { background: #f2f2f2; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An image file (.png or .jpg) with the text that stands for it."""

    path: Path
    text: str


Block = Heading | Paragraph | Picture | Table


@dataclass
class Report:
    """A title and blocks, in order."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def to_markdown(self, folder: Path) -> str:
        """Markdown; pictures are linked relative to `folder`, where the text will be stored."""
        parts = [f"# {self.title}"]
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"## {block.text}")
            elif isinstance(block, Paragraph):
                parts.append(block.text)
            elif isinstance(block, Picture):
                target = Path(os.path.relpath(block.path, folder)).as_posix()
                parts.append(f"![{block.text}]({target})")
            else:
                parts.append(block.to_markdown())
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """One HTML page with everything inside, pictures too.

        Raises:
            UserError: a picture is missing or of another kind.
        """
        body = "\n".join(_block_html(block) for block in self.blocks)
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )


def _block_html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Picture):
        kind = PICTURE_TYPES.get(block.path.suffix.lower())
        if kind is None or not block.path.is_file():
            raise UserError(f"{block.path}: no such .png or .jpg picture for the report")
        encoded = base64.b64encode(block.path.read_bytes()).decode("ascii")
        text = html.escape(block.text)
        return f'<figure><img src="data:{kind};base64,{encoded}" alt="{text}"><figcaption>{text}</figcaption></figure>'
    caption = f"<caption>{html.escape(block.caption)}</caption>" if block.caption else ""
    header = "".join(f"<th>{html.escape(title)}</th>" for title in block.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    return f"<table>{caption}\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"

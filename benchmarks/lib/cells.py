"""A benchmark's results: one JSON file of cells, each written as soon as it is measured, and its tables beside it."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from norton_deploy.config import parse_settings
from norton_deploy.errors import INTERRUPTED, UserError
from norton_deploy.files import atomic_write
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.report import Report, Table
from norton_deploy.result_file import ResultFile

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.figure import Figure

S = TypeVar("S", bound="DataclassInstance")
Cell = dict[str, Any]
CONFIGS = Path("configs")
PLANS = CONFIGS / "plans"
"""Of the repository, in whose root folder benchmarks run."""
RESULTS = Path(__file__).parents[1] / "results"


class ResultCells(ResultFile):
    """Cells by name, all measured with the same settings; a cell that is there already is not measured again.

    Args:
        path: JSON file; {"settings": ..., "cells": {name: ...}}.
        settings: what the figures depend on, as JSON values; see `settings_of`.
        report: makes the tables of these results: Markdown, or a page that is written as HTML too.

    Raises:
        UserError: the file's cells were measured with other settings.
    """

    path: Path

    def __init__(
        self, path: Path, settings: Mapping[str, Any], report: "Callable[[ResultCells], str | Report]"
    ) -> None:
        super().__init__(path, settings, otherwise="give the old value or another --out")
        self.report = report

    def measure(self, name: str, run: Callable[[], Mapping[str, Any]], *, again: bool = False) -> Cell:
        """The cell `name`: from the file, or from `run` (always if `again`), then written with its duration and
        provenance, and so are the tables."""
        if again or name not in self.cells:
            print(f"== {name}", file=sys.stderr, flush=True)
            started = time.perf_counter()
            cell = run()
            seconds = round(time.perf_counter() - started, 1)
            self.add({name: {**cell, "seconds": seconds, "provenance": provenance()}})
            self.write()
        return self.cells[name]

    def measure_all(self, runs: Mapping[str, Callable[[], Mapping[str, Any]]]) -> int:
        """The cells that are missing, then the tables; returns 1 if a cell holds a "failure", otherwise 0."""
        for name, run in runs.items():
            self.measure(name, run)
        self.write()
        return int(any("failure" in cell for cell in self.cells.values()))

    def write(self) -> None:
        """The tables of the cells so far, beside the JSON file."""
        made = self.report(self)
        if isinstance(made, Report):
            with atomic_write(self.path.with_suffix(".html"), "w") as stream:
                stream.write(made.to_html())
            made = made.to_markdown(self.path.parent)
        with atomic_write(self.path.with_suffix(".md"), "w") as stream:
            stream.write(made.rstrip("\n") + "\n")


def settings_of(settings: "DataclassInstance", *without: str) -> dict[str, Any]:
    """What a benchmark was told, paths as text, without its output, its work folder and the names given."""
    kept = {name: value for name, value in asdict(settings).items() if name not in ("out", "work", *without)}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def run(settings_class: type[S], benchmark: Callable[[S], int | None]) -> NoReturn:
    """Run a script: settings from the command line, the benchmark, its exit status; a user's mistake and Ctrl-C
    are one line."""
    description = sys.modules[benchmark.__module__].__doc__ or ""
    try:
        settings = parse_settings(settings_class, prog=Path(sys.argv[0]).stem, description=description)
        sys.exit(benchmark(settings) or 0)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is done", file=sys.stderr)
        sys.exit(INTERRUPTED)


def tabulate(caption: str, rows: Iterable[Any], columns: Mapping[str, Callable[[Any], str]]) -> Table:
    """One line a row; `columns` are titles and what stands below them."""
    return Table(tuple(columns), tuple(tuple(cell(row) for cell in columns.values()) for row in rows), caption)


def page(*parts: Table | str) -> str:
    """Tables and paragraphs as Markdown."""
    return "\n\n".join(part.to_markdown() if isinstance(part, Table) else part for part in parts)


def interval(speedup: Mapping[str, float], digits: int = 2) -> str:
    """A paired ratio with its 95 % interval."""
    ratio, low, high = (f"{speedup[key]:.{digits}f}" for key in ("ratio", "low", "high"))
    return f"{ratio} ({low} to {high})"


def spread(times_ms: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": median(times_ms), "min": min(times_ms), "max": max(times_ms)}


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG; returns its path."""
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")
    return path

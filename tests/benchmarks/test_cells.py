"""Cells are measured once, survive an interruption, and belong to their settings; a user's mistake is one line."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.lib.cells import ResultCells, page, run, settings_of, tabulate
from norton_deploy.errors import INTERRUPTED, UserError
from norton_deploy.reporting.report import Paragraph, Report


def report(results: ResultCells) -> str:
    return page(tabulate("caption", results.cells, {"x": str}), "notes")


def test_a_cell_is_measured_once_and_written_at_once(tmp_path) -> None:
    path, calls = tmp_path / "cells.json", []

    def measure() -> dict:
        calls.append(1)
        return {"top1": 0.5}

    def fail() -> dict:
        raise KeyboardInterrupt

    results = ResultCells(path, {"steps": 3, "image_size": (32, 32)}, report)
    assert results.measure("a", measure)["top1"] == 0.5
    with pytest.raises(KeyboardInterrupt):
        results.measure("b", fail)
    again = ResultCells(path, {"steps": 3, "image_size": (32, 32)}, report)
    assert again.measure("a", fail)["top1"] == 0.5
    again.measure("b", measure)
    assert len(calls) == 2
    written = json.loads(path.read_text())
    assert list(written["cells"]) == ["a", "b"] and written["settings"]["steps"] == 3
    assert {"seconds", "provenance"} <= set(written["cells"]["b"])
    assert path.with_suffix(".md").read_text() == "caption\n\n| x |\n| --- |\n| a |\n| b |\n\nnotes\n"
    again.measure("a", measure, again=True)
    assert len(calls) == 3 and again.measure_all({"a": fail}) == 0
    assert again.measure_all({"c": lambda: {"failure": "broken"}}) == 1


def test_a_page_is_written_as_html_too(tmp_path) -> None:
    results = ResultCells(tmp_path / "cells.json", {}, lambda results: Report("title", [Paragraph("text")]))
    results.measure("a", dict)
    assert results.path.with_suffix(".md").read_text() == "# title\n\ntext\n"
    assert "<h1>title</h1>" in results.path.with_suffix(".html").read_text()


def test_other_settings_are_refused(tmp_path) -> None:
    ResultCells(tmp_path / "cells.json", {"steps": 3}, report).measure("a", dict)
    with pytest.raises(UserError, match="steps = 3, now it is 4"):
        ResultCells(tmp_path / "cells.json", {"steps": 4}, report)


@dataclass
class Settings:
    """Settings of a script."""

    data: Path
    out: Path = Path("x.json")
    work: Path = Path("runs")
    sizes: tuple[int, ...] = (1, 2)


def test_a_script_ends_with_its_status_or_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["script", "--data", "folder", "--sizes", "3"])
    seen = []

    def benchmark(settings: Settings) -> int | None:
        seen.append(settings_of(settings))
        return 3 if len(seen) == 1 else None

    for status in (3, 0):
        with pytest.raises(SystemExit) as end:
            run(Settings, benchmark)
        assert end.value.code == status and seen[-1] == {"data": "folder", "sizes": [3]}

    def mistaken(settings: Settings) -> None:
        raise UserError("folder: not there")

    with pytest.raises(SystemExit) as end:
        run(Settings, mistaken)
    assert end.value.code == "error: folder: not there"

    def stopped(settings: Settings) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(Settings, stopped)
    assert end.value.code == INTERRUPTED and capsys.readouterr().err.startswith("interrupted; ")

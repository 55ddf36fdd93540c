"""Cells are measured once, survive an interruption, and belong to their settings."""

import json

import pytest

from benchmarks.lib.result_cells import ResultCells
from norton_deploy.errors import UserError
from norton_deploy.reporting.tables import Table


def test_a_cell_is_measured_once_and_written_at_once(tmp_path) -> None:
    path, calls = tmp_path / "cells.json", []

    def run() -> dict:
        calls.append(1)
        return {"top1": 0.5}

    def fail() -> dict:
        raise KeyboardInterrupt

    results = ResultCells(path, {"steps": 3, "image_size": (32, 32)})
    assert results.measure("a", run)["top1"] == 0.5
    with pytest.raises(KeyboardInterrupt):
        results.measure("b", fail)
    again = ResultCells(path, {"steps": 3, "image_size": (32, 32)})
    assert again.measure("a", fail)["top1"] == 0.5
    again.measure("b", run)
    assert len(calls) == 2
    written = json.loads(path.read_text())
    assert list(written["cells"]) == ["a", "b"] and written["settings"]["steps"] == 3
    assert {"seconds", "provenance"} <= set(written["cells"]["b"])
    again.write_markdown([Table(("x",), (("1",),), "caption")], "notes")
    assert path.with_suffix(".md").read_text() == "caption\n\n| x |\n| --- |\n| 1 |\n\nnotes\n"


def test_other_settings_are_refused(tmp_path) -> None:
    ResultCells(tmp_path / "cells.json", {"steps": 3}).measure("a", dict)
    with pytest.raises(UserError, match="steps = 3, now it is 4"):
        ResultCells(tmp_path / "cells.json", {"steps": 4})

"""docs/results.md is what benchmarks/collect.py writes, and says nothing of the machine that its files were made on."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import collect, rivals, table1_cifar, table4_rank
from benchmarks.lib.result_cells import ResultCells
from benchmarks.lib.table3_accuracy import accuracy_report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_document_is_made_from_the_result_files() -> None:
    text = collect.document()
    assert (ROOT / "docs" / "results.md").read_text() == text, "run benchmarks/collect.py"
    assert text.count("\n## ") >= 5


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [
        ("table1_cifar", table1_cifar),
        ("table1_cifar_long", table1_cifar),
        ("table4_rank", table4_rank),
        ("rivals", rivals),
    ],
)
def test_tables_of_cells_are_made_from_their_json(name: str, benchmark: ModuleType, tmp_path: Path) -> None:
    again = Path(shutil.copy(RESULTS / f"{name}.json", tmp_path))
    benchmark.write(ResultCells(again, json.loads(again.read_text())["settings"]))
    assert again.with_suffix(".md").read_text() == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("name", ["table3_accuracy", "table3_accuracy_long"])
def test_table_3_s_accuracy_is_made_from_its_json(name: str) -> None:
    report = accuracy_report(json.loads((RESULTS / f"{name}.json").read_text()))
    assert report.to_markdown(RESULTS) == (RESULTS / f"{name}.md").read_text()


def test_result_files_hold_no_absolute_paths() -> None:
    for path in RESULTS.glob("*.json"):
        text = path.read_text()
        assert not any(f'"{folder}/' in text or f" {folder}/" in text for folder in ("/home", "/root", "/tmp", "/work"))

"""docs/results.md is what benchmarks/collect.py writes, each table is made from its JSON, which hides the machine."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import collect
from benchmarks.lib.cells import RESULTS, ResultCells

ROOT = Path(__file__).parents[2]
NO_CELLS = {"demo", "plan", "plan_int8", "plan_packaged"}
MODULES = {
    "faults": "tests.faults.kill_runs",
    "fuzz": "tests.fuzz.run",
    "int8_packaged": "benchmarks.int8",
    "memorise_real_mixed": "benchmarks.memorise_real",
    "packaged": "benchmarks.package_weights",
    "pareto_coupled": "benchmarks.pareto",
    "pareto_keypoint": "benchmarks.pareto",
    "recovery_rank1": "benchmarks.recovery",
    "recovery_shared": "benchmarks.recovery",
    "table1_cifar_long": "benchmarks.table1_cifar",
    "table3_accuracy_long": "benchmarks.table3_accuracy",
    "table3_full_width": "benchmarks.table3_accuracy",
    "table3_mixed": "benchmarks.table3_accuracy",
    "whole_detector_mixed": "benchmarks.whole_detector",
}
"""Result file -> the benchmark that made it, where `benchmarks/` has none of its name."""
NAMES = sorted({path.stem for path in RESULTS.glob("*.json")} - NO_CELLS)


def test_the_document_is_made_from_the_result_files() -> None:
    text = collect.document()
    assert (ROOT / "docs" / "results.md").read_text() == text, "run benchmarks/collect.py"
    assert text.count("\n## ") >= 5


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_file_gives_its_tables_again(name: str, tmp_path: Path) -> None:
    benchmark = import_module(MODULES.get(name, f"benchmarks.{name}"))
    again = Path(shutil.copy(RESULTS / f"{name}.json", tmp_path))
    results = ResultCells(again, json.loads(again.read_text())["settings"], benchmark.report)
    assert results.measure_all({}) == 0
    assert again.with_suffix(".md").read_text() == (RESULTS / f"{name}.md").read_text()
    assert json.loads(again.read_text()) == json.loads((RESULTS / f"{name}.json").read_text())


def test_every_section_has_its_result_file() -> None:
    assert {*NAMES, *NO_CELLS} >= {*collect.SECTIONS}


def test_every_note_has_its_section() -> None:
    assert {*collect.NOTES} <= {*collect.SECTIONS}


def test_result_files_hold_no_absolute_paths() -> None:
    for path in RESULTS.glob("*.json"):
        text = path.read_text()
        assert not any(f'"{folder}/' in text or f" {folder}/" in text for folder in ("/home", "/root", "/tmp", "/work"))

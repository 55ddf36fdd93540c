"""docs/results.md is what benchmarks/collect.py writes, each table is made from its JSON, which hides the machine."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import (
    channel_multiple,
    cifar_gpu,
    collect,
    compression_time,
    drawing,
    engine_builds,
    export_matrix,
    export_parity,
    gpu,
    gradcam,
    int8,
    keypoint_decoding,
    loading,
    make_plans,
    memorise_real,
    operator_forms,
    operator_profile,
    package_weights,
    pareto,
    recipes,
    recovery,
    rivals,
    size_buckets,
    soak,
    table1_cifar,
    table3,
    table3_accuracy,
    table4_rank,
    training_forms,
    whole_detector,
)
from benchmarks.lib.cells import RESULTS, ResultCells
from tests.faults import kill_runs
from tests.fuzz import run as fuzz

ROOT = Path(__file__).parents[2]
BENCHMARKS = {
    "channel_multiple": channel_multiple,
    "cifar_gpu": cifar_gpu,
    "compression_time": compression_time,
    "drawing": drawing,
    "engine_builds": engine_builds,
    "export_matrix": export_matrix,
    "export_parity": export_parity,
    "faults": kill_runs,
    "fuzz": fuzz,
    "gpu": gpu,
    "gradcam": gradcam,
    "int8": int8,
    "keypoint_decoding": keypoint_decoding,
    "loading": loading,
    "make_plans": make_plans,
    "memorise_real": memorise_real,
    "operator_forms": operator_forms,
    "operator_profile": operator_profile,
    "packaged": package_weights,
    "pareto": pareto,
    "recipes": recipes,
    "recovery": recovery,
    "recovery_shared": recovery,
    "rivals": rivals,
    "size_buckets": size_buckets,
    "soak": soak,
    "table1_cifar": table1_cifar,
    "table1_cifar_long": table1_cifar,
    "table3": table3,
    "table3_accuracy": table3_accuracy,
    "table3_accuracy_long": table3_accuracy,
    "table4_rank": table4_rank,
    "training_forms": training_forms,
    "whole_detector": whole_detector,
}
"""Result file -> the benchmark that made it."""


def test_the_document_is_made_from_the_result_files() -> None:
    text = collect.document()
    assert (ROOT / "docs" / "results.md").read_text() == text, "run benchmarks/collect.py"
    assert text.count("\n## ") >= 5


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_finished_file_gives_its_tables_again(name: str, tmp_path: Path) -> None:
    again = Path(shutil.copy(RESULTS / f"{name}.json", tmp_path))
    results = ResultCells(again, json.loads(again.read_text())["settings"], BENCHMARKS[name].report)
    assert results.measure_all({}) == 0
    assert again.with_suffix(".md").read_text() == (RESULTS / f"{name}.md").read_text()
    assert json.loads(again.read_text()) == json.loads((RESULTS / f"{name}.json").read_text())


def test_every_result_file_has_its_benchmark() -> None:
    others = {"demo", "plan", "fuzz"}
    assert {path.stem for path in RESULTS.glob("*.json")} == {*BENCHMARKS, *others} >= {*collect.SECTIONS}


def test_result_files_hold_no_absolute_paths() -> None:
    for path in RESULTS.glob("*.json"):
        text = path.read_text()
        assert not any(f'"{folder}/' in text or f" {folder}/" in text for folder in ("/home", "/root", "/tmp", "/work"))

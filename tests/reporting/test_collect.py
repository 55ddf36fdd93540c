"""docs/results.md is what benchmarks/collect.py writes, and says nothing of the machine that its files were made on."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_document_is_made_from_the_result_files() -> None:
    spec = importlib.util.spec_from_file_location("collect", ROOT / "benchmarks" / "collect.py")
    assert spec is not None and spec.loader is not None
    collect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collect)
    text = collect.document()
    assert (ROOT / "docs" / "results.md").read_text() == text, "run benchmarks/collect.py"
    assert text.count("\n## ") >= 5


def test_result_files_hold_no_absolute_paths() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        text = path.read_text()
        assert not any(f'"{folder}/' in text or f" {folder}/" in text for folder in ("/home", "/root", "/tmp", "/work"))

"""The export parity benchmark: which cells, resuming, failures that stay on record."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import export_parity
from benchmarks.export_parity import Settings, Source
from norton_deploy.errors import UserError


class InventedExport:
    """Stands for `export_parity.export`: invents a report, or fails where it is told to."""

    def __init__(self) -> None:
        self.broken: set[tuple[str, str]] = set()
        self.calls: list[tuple[str, str]] = []

    def __call__(self, source: Source, images: Any, settings: Settings, folder: Path) -> dict[str, Any]:
        cell = source.task, source.target
        self.calls.append(cell)
        if cell in self.broken:
            raise UserError(f"{folder / 'graph.onnx'}: differs from eager mode, first in stage 'boxes'")
        measures = ["bbox", *{"mask": ["segm"], "keypoint": ["keypoints"]}.get(source.task, [])]
        precision = {measure: 0.25 * (index + 1) for index, measure in enumerate(measures)}
        return {
            "parity": {"stages": [], "detections": 7},
            "export_s": 12.0,
            "average_precision": {"before": precision, "after": precision},
        }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run the benchmark on a tiny image with other settings and an invented export."""
    settings = Settings(out=tmp_path / "r.json", embedded=1, image_size=(64, 64))

    def run(export: Callable[..., dict[str, Any]], **other: Any) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(export_parity, "export", export)
        status = export_parity.main(replace(settings, **other))
        return status, json.loads(settings.out.read_text()), settings.out.with_suffix(".md").read_text()

    return run


def test_twelve_cells_resumed_and_retried(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = InventedExport()
    export.broken = {("mask", "tensorrt")}
    status, results, table = run(export)
    assert status == 1 and len(export.calls) == 12 and len(results["cells"]) == 12
    assert list(results["cells"]) == list(export_parity.CELLS)
    failed = {name for name, cell in results["cells"].items() if "failure" in cell}
    assert failed == {"mask, dense, tensorrt", "mask, NORTON, tensorrt"}
    for cell in results["cells"].values():
        assert {"command", "date", "machine", "versions"} <= set(cell["provenance"])
    assert str(tmp_path) not in table and "/tmp" not in json.dumps(
        [c.get("failure") for c in results["cells"].values()]
    )
    assert "box AP 0.2500 -> 0.2500; keypoint AP (OKS) 0.5000 -> 0.5000" in table
    assert table.count("graph.onnx: differs from eager mode, first in stage 'boxes'") == 2
    assert "12 of 12 cells in r.json, 2 failed" in capsys.readouterr().out

    run(export)
    assert len(export.calls) == 12
    export.broken = set()
    status, results, table = run(export, retry=True)
    assert status == 0 and len(export.calls) == 14
    [earlier] = results["cells"]["mask, dense, tensorrt"]["earlier_failures"]
    assert "first in stage 'boxes'" in earlier["failure"] and "date" in earlier["provenance"]
    assert table.count("equal (failed before: graph.onnx: differs") == 2
    with pytest.raises(UserError, match="give the old value or another --out"):
        run(export, image_size=(96, 96))


def test_an_unexpected_error_costs_one_cell_only(run) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise ZeroDivisionError("division by zero")

    status, results, table = run(broken)
    assert status == 1 and {cell["failure"] for cell in results["cells"].values()} == {
        "ZeroDivisionError: division by zero"
    }
    assert "| box, dense, onnxruntime | ZeroDivisionError" in table


def test_models_find_their_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Header:
        def __init__(self, path: Path) -> None:
            self.task, _, kind = path.parent.name.partition("-")
            self.plan = None if kind.startswith("dense") else object()

    monkeypatch.setattr(export_parity, "read_header", Header)
    for name in ("box-dense", "box-norton", "keypoint-norton"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.safetensors").touch()
    settings = Settings(models=(tmp_path,), out=tmp_path / "r.json", embedded=0, image_size=(64, 64))
    planned = export_parity.plan_cells(settings)
    assert list(planned) == [
        f"{kind}, {target}"
        for kind in ("box, dense", "box, NORTON", "keypoint, NORTON")
        for target in ("onnxruntime", "tensorrt")
    ]
    expected = Source("box", tmp_path / "box-norton" / "last.safetensors", target="tensorrt")
    assert planned["box, NORTON, tensorrt"] == expected
    monkeypatch.setattr(export_parity, "export", InventedExport())
    assert export_parity.main(settings) == 0
    assert "| box, dense, onnxruntime | equal |" in settings.out.with_suffix(".md").read_text()
    assert "| mask, dense, onnxruntime | not run |" in settings.out.with_suffix(".md").read_text()
    (tmp_path / "box-dense-2").mkdir()
    (tmp_path / "box-dense-2" / "last.safetensors").touch()
    with pytest.raises(UserError, match="both are box, dense"):
        export_parity.plan_cells(settings)
    (tmp_path / "cls").mkdir()
    with pytest.raises(UserError, match=r"no last\.safetensors"):
        export_parity.plan_cells(Settings(models=(tmp_path / "cls",)))

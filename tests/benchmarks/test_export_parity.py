"""The export parity benchmark: which cells, resuming, failures that stay on record."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import export_parity
from norton_deploy.errors import UserError


class InventedExport:
    """Stands for export_onnx.main: writes a report, or fails where it is told to."""

    def __init__(self) -> None:
        self.broken: set[tuple[str, str]] = set()
        self.calls: list[tuple[str, str]] = []

    def __call__(self, argv: list[str]) -> int:
        option = dict(itertools.pairwise(argv))
        cell = option["--task"], option["--target"]
        self.calls.append(cell)
        if cell in self.broken:
            raise UserError(f"{option['--out']}: differs from eager mode, first in stage 'boxes'")
        measures = ["bbox", *{"mask": ["segm"], "keypoint": ["keypoints"]}.get(cell[0], [])]
        precision = {measure: 0.25 * (index + 1) for index, measure in enumerate(measures)}
        report = {
            "file": option["--out"],
            "parity": {"graph": option["--out"], "stages": [], "detections": 7},
            "export_s": 12.0,
            "average_precision": {"before": precision, "after": precision},
        }
        Path(option["--json"]).write_text(json.dumps(report))
        return 0


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    status = export_parity.main(["--out", str(out), "--embedded", "1", "--image-size", "64", "64", *arguments])
    return status, json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_twelve_cells_resumed_and_retried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = InventedExport()
    export.broken = {("mask", "tensorrt")}
    monkeypatch.setattr(export_parity.export_onnx, "main", export)
    status, results, table = run(tmp_path / "r.json")
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

    run(tmp_path / "r.json")
    assert len(export.calls) == 12
    export.broken = set()
    status, results, table = run(tmp_path / "r.json", "--retry")
    assert status == 0 and len(export.calls) == 14
    [earlier] = results["cells"]["mask, dense, tensorrt"]["earlier_failures"]
    assert "first in stage 'boxes'" in earlier["failure"] and "date" in earlier["provenance"]
    assert table.count("equal (failed before: graph.onnx: differs") == 2
    with pytest.raises(UserError, match="give another --out"):
        run(tmp_path / "r.json", "--image-size", "96", "96")


def test_an_unexpected_error_costs_one_cell_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(argv: list[str]) -> int:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(export_parity.export_onnx, "main", broken)
    status, results, _ = run(tmp_path / "r.json")
    assert status == 1 and {cell["failure"] for cell in results["cells"].values()} == {
        "ZeroDivisionError: division by zero"
    }
    del results["cells"]["box, dense, onnxruntime"]
    assert export_parity.table_of(results).rows[0][:2] == ("box, dense, onnxruntime", "not run")


def test_models_find_their_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Header:
        def __init__(self, path: Path) -> None:
            self.task, _, kind = path.parent.name.partition("-")
            self.plan = None if kind.startswith("dense") else object()

    monkeypatch.setattr(export_parity, "read_header", Header)
    for name in ("box-dense", "box-norton", "keypoint-norton"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.safetensors").touch()
    planned = export_parity.plan_cells(export_parity.Settings(models=(tmp_path,)))
    assert list(planned) == [
        f"{kind}, {target}"
        for kind in ("box, dense", "box, NORTON", "keypoint, NORTON")
        for target in ("onnxruntime", "tensorrt")
    ]
    expected = ["--model", str(tmp_path / "box-norton" / "last.safetensors"), "--target", "tensorrt"]
    assert planned["box, NORTON, tensorrt"] == expected
    (tmp_path / "box-dense-2").mkdir()
    (tmp_path / "box-dense-2" / "last.safetensors").touch()
    with pytest.raises(UserError, match="both are box, dense"):
        export_parity.plan_cells(export_parity.Settings(models=(tmp_path,)))
    (tmp_path / "cls").mkdir()
    with pytest.raises(UserError, match=r"no last\.safetensors"):
        export_parity.plan_cells(export_parity.Settings(models=(tmp_path / "cls",)))

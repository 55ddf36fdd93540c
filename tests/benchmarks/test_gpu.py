"""benchmarks/gpu.py where there is no GPU: every cell runs in its smallest form, or says why it does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEED_A_GPU = {"captures", "compiled"}


@pytest.mark.slow
def test_every_cell_runs_or_says_why_not(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--smoke", "--budget", "400", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads(out.read_text())["cells"]
    assert {name for name, cell in cells.items() if "needs a CUDA GPU" in cell.get("why", "")} == NEED_A_GPU
    assert {cell["status"] for cell in cells.values()} == {"done", "skipped"}
    reports = [report for report in cells["correctness"]["result"].values() if report != "not in --smoke"]
    assert len(reports) == 4 and all(report["passed"] and report["detections"] > 0 for report in reports)

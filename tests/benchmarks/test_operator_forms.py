"""The forms of one operation give the same; their times are not looked at."""

import json
import time
from types import SimpleNamespace

import pytest

from benchmarks import operator_forms


@pytest.mark.slow
def test_all_forms_give_what_graphs_have(tmp_path, monkeypatch):
    monkeypatch.setattr(operator_forms, "DEFAULT_ITERATIONS", 6)
    # processor time may come in ticks of milliseconds, in which so little is nothing
    monkeypatch.setattr(operator_forms, "time", SimpleNamespace(process_time=time.perf_counter))
    settings = operator_forms.Settings(tmp_path / "forms.json", 64, channels=3, proposals=60, rounds=2)
    assert operator_forms.main(settings) == 0
    cells = json.loads(settings.out.read_text())["cells"]
    forms = [found for cell in cells.values() for found in cell["forms"].values()]
    assert len(forms) == 3 + 3 + 2 + 4
    assert max(found.get("difference", 0.0) for found in forms) < 1e-5
    assert "| TopK of 120,000 anchors | in two stages |" in settings.out.with_suffix(".md").read_text()

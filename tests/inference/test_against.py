"""benchmarks/against.py on tiny graphs; here because the maker of those is."""

import json

import pytest

from benchmarks import against
from norton_deploy.errors import UserError


def test_graphs_of_one_name_are_compared(graph, tmp_path):
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        graph(f"{folder}/box_fast.onnx", batch=1)
    graph("new/mask_fast.onnx", task="mask")
    settings = against.Settings("abc1234", tmp_path / "old", tmp_path / "new", 6, tmp_path / "against.json")
    assert against.main(settings) == 0
    written = json.loads((tmp_path / "against.json").read_text())
    assert list(written["cells"]) == ["box_fast"] and written["settings"] == {"commit": "abc1234", "rounds": 6}
    cell = written["cells"]["box_fast"]
    assert cell["old"]["detections"] == cell["new"]["detections"] and cell["speedup"]["pairs"] == 6
    assert "| box fast |" in (tmp_path / "against.md").read_text()
    with pytest.raises(UserError, match="no graph"):
        against.main(against.Settings("abc1234", tmp_path, tmp_path / "new", 6, tmp_path / "other.json"))

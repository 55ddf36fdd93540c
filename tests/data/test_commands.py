"""make_synthetic and make_crops as a user runs them."""

from pathlib import Path

import pytest

from norton_deploy.commands import run


def test_dataset_then_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, crops = tmp_path / "data", tmp_path / "crops"
    sizes = ["--min-size", "96", "--max-size", "128"]
    assert run("make_synthetic", ["--out", str(data), "--train", "5", "--val", "3", "--seed", "1", *sizes]) == 0
    assert "5 training and 3 validation images of person, stop sign" in capsys.readouterr().out
    assert len(list((data / "train2017").iterdir())) == 5 and len(list((data / "val2017").iterdir())) == 3
    assert run("make_crops", ["--data", str(data), "--out", str(crops), "--size", "24"]) == 0
    assert "validation crops" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("make_synthetic", ["--out", str(tmp_path), "--train", "0"]) == 1
    assert run("make_crops", ["--data", str(tmp_path), "--out", str(tmp_path / "crops")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "expected COCO's layout" in lines[1]

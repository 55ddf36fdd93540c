"""Progress off a terminal is plain lines."""

import pytest

from norton_deploy import progress
from norton_deploy.progress import progress_bar


def test_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    assert list(progress_bar(range(3), desc="detecting", unit="image")) == [0, 1, 2]
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and "\r" not in captured.err
    assert lines[0].startswith("detecting: image 0 of 3, ") and lines[-1].startswith("detecting: image 3 of 3, ")
    assert all(line.startswith("detecting: ") for line in lines) and len(set(lines)) == len(lines)


def test_nothing_where_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(3), desc="detecting", unit="image", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_where_nobody_knows_how_many(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress_bar(desc="looking at images", unit="batches") as bar:
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("looking at images: 0 batches, ")
    assert lines[-1].startswith("looking at images: 1 batches, ")

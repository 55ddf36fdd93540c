"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, new_folder


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "above" / "data"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match="holds something already"), new_folder(target):
        pass


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    leftover = tmp_path / ".data.partial"
    leftover.mkdir()
    (leftover / "old").write_text("of an interrupted run")
    with pytest.raises(ValueError), new_folder(target) as folder:
        assert list(folder.iterdir()) == []
        raise ValueError
    assert list(tmp_path.iterdir()) == [target]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here"), new_folder(tmp_path / "file" / "data"):
        pass


def test_a_file_keeps_its_old_content_when_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ValueError), atomic_write(target, "w") as stream:
        stream.write("half")
        raise ValueError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]

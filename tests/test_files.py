"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, check_output_file, new_folder, refuse_same_file


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


def test_a_file_cannot_replace_a_folder_and_says_so(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(UserError, match="folder: cannot be written"), atomic_write(target, "w") as stream:
        stream.write("text")
    assert list(tmp_path.iterdir()) == [target]


def test_an_output_is_checked_before_the_work(tmp_path: Path) -> None:
    check_output_file(None, "--json")
    check_output_file(Path("-"), "--json")
    check_output_file(tmp_path / "new" / "folder" / "model.onnx", "--out", ".onnx")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "model.pth", "ends in .onnx"),
        (tmp_path / "file" / "model.onnx", "cannot write in .*file"),
    ]:
        with pytest.raises(UserError, match=f"--out .*{message}"):
            check_output_file(path, "--out", "" if path == tmp_path else ".onnx")


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    one, link, other = tmp_path / "one", tmp_path / "link", tmp_path / "other"
    one.write_text("")
    link.symlink_to(one)
    other.write_text("")
    refuse_same_file(one, None, other, tmp_path / "absent")
    refuse_same_file(tmp_path / "new", one)
    with pytest.raises(UserError, match="would be lost"):
        refuse_same_file(link, other, one)

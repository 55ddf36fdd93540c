"""Files and folders appear whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest

from norton_deploy.errors import UserError, shown
from norton_deploy.files import (
    atomic_write,
    check_output_file,
    check_tree,
    new_folder,
    path_below,
    path_component,
    read_json,
    refuse_same_file,
)
from norton_deploy.result_file import ResultFile


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "above" / "data"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "ordinary").mkdir()
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    with pytest.raises(UserError, match="holds something already"), new_folder(target):
        pass


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    leftover = tmp_path / ".data.k3j_x9ab.partial"
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
    check_output_file(None, "--json", overwrite=False)
    check_output_file(Path("-"), "--json", overwrite=False)
    check_output_file(tmp_path / "new" / "folder" / "model.onnx", "--out", ".onnx", overwrite=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "model.pth", "ends in .onnx"),
        (tmp_path / "file" / "model.onnx", "cannot write in .*file"),
    ]:
        with pytest.raises(UserError, match=f"--out .*{message}"):
            check_output_file(path, "--out", "" if path == tmp_path else ".onnx", overwrite=True)
    with pytest.raises(UserError, match=r"--out .*file: is there already; .* --overwrite"):
        check_output_file(tmp_path / "file", "--out", overwrite=False)
    check_output_file(tmp_path / "file", "--out", overwrite=True)


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    one, link, other = tmp_path / "one", tmp_path / "link", tmp_path / "other"
    one.write_text("")
    link.symlink_to(one)
    other.write_text("")
    refuse_same_file(one, None, other, tmp_path / "absent")
    refuse_same_file(tmp_path / "new", one)
    with pytest.raises(UserError, match="would be lost"):
        refuse_same_file(link, other, one)


def test_results_are_kept_and_belong_to_their_settings(tmp_path: Path) -> None:
    path, settings = tmp_path / "below" / "results.json", {"seed": 0, "size": (2, 3)}
    first = ResultFile(path, settings, otherwise="delete it")
    first.add({"a": 1.5})
    first.add({"b": {"ms": [1, 2]}})
    again = ResultFile(path, settings, otherwise="delete it")
    assert again.cells == {"a": 1.5, "b": {"ms": [1, 2]}} == first.cells
    with pytest.raises(UserError, match=r"results\.json: measured with size = \[2, 3\], now it is \[2, 4\]; delete it"):
        ResultFile(path, {**settings, "size": (2, 4)}, otherwise="delete it")
    with pytest.raises(UserError, match="measured with threads = None, now it is 2"):
        ResultFile(path, {**settings, "threads": 2}, otherwise="")
    assert ResultFile(path, {"seed": 1}, resume=False, otherwise="").cells == {}
    path.write_text('{"times_ms": {}}')
    with pytest.raises(UserError, match="not a file of results"):
        ResultFile(path, settings, otherwise="")


def test_results_can_wait_for_the_next_writing_or_stay_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = ResultFile(path, {}, otherwise="", every_s=3600)
    results.add({"a": 1})
    assert not path.exists()
    results.save()
    assert ResultFile(path, {}, otherwise="").cells == {"a": 1}
    ResultFile(None, {}, otherwise="").add({"a": 1})
    assert list(tmp_path.iterdir()) == [path]


def test_names_from_data_stay_one_component() -> None:
    assert path_component("traffic light") == "traffic_light"
    assert path_component("Käse (alt), 2.") == "Käse_(alt),_2."
    assert path_component("a/b\0") == "a%2Fb%00" and path_component("..") == "%2E." and path_component("*%") == "%2A%25"
    long = [path_component("é" * 200 + end) for end in "ab"]
    assert long[0] != long[1] and all(len(name.encode()) <= 100 for name in long)
    assert "/" not in path_component("\ud800/")
    with pytest.raises(UserError, match="empty name"):
        path_component("")


def test_paths_from_data_stay_below_their_folder() -> None:
    assert path_below("root", "a/b.jpg") == Path("root/a/b.jpg")
    for name in ("", ".", "/etc", "..", "a/../b", "a/..", "a\0", "x" * 256, "é" * 128, "//server/x"):
        with pytest.raises(UserError, match="stays below root"):
            path_below("root", name)


def test_json_of_strangers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("", "{", "[" * 100_000, "1" * 5000, "nul"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
            read_json(path, "settings")
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"a\.json: not text"):
        read_json(path, "settings")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe; expected settings"):
        read_json(tmp_path / "pipe", "settings")


def test_trees_that_repeat_themselves_are_bounded() -> None:
    tree: Any = [1]
    for _ in range(40):
        tree = [tree, tree]
    with pytest.raises(UserError, match="file: holds more than 1000000 values"):
        check_tree(tree, "file")
    ring: list[Any] = []
    ring.append({"again": ring})
    with pytest.raises(UserError, match="file: is nested more than 100 levels"):
        check_tree(ring, "file")
    check_tree({"a": [{"b": (1, 2)}] * 1000}, "file")


def test_messages_are_one_line_without_control_characters() -> None:
    assert str(UserError("a\n b\x1b[31m\r\0c")) == "a  b [31m c"
    assert len(str(UserError("x" * 10_000))) < 1600
    assert shown([10**5000]) == "a value of type list" and len(shown("x" * 1000)) < 110

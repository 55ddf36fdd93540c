"""The restricted unpickler: arrays in plain containers come through, everything else is refused and never runs."""

import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from norton_deploy.detectron2.pickle import read_pickle
from norton_deploy.errors import UserError


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.RandomState(0)
    return {
        "matrix": generator.standard_normal((3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(generator.standard_normal((2, 3, 5))),
        "big endian": np.arange(6, dtype=">i4").reshape(2, 3),
        "half": np.ones((2,), np.float16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
    }


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_and_containers_come_through(tmp_path: Path, protocol: int) -> None:
    content = {
        "model": OrderedDict(arrays()),
        "__author__": "somebody",
        "matching_heuristics": True,
        "numbers": [1, 2.5, None, (3, "four"), np.float64(0.25)],
    }
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_pickle(path)
    assert found["numbers"] == [1, 2.5, None, (3, "four"), 0.25] and found["matching_heuristics"] is True
    assert list(found["model"]) == list(arrays())
    for name, expected in arrays().items():
        array = found["model"][name]
        assert array.shape == expected.shape and array.dtype == expected.dtype.newbyteorder("=")
        assert np.array_equal(array, expected)
        torch.from_numpy(array)


class Runs:
    """Creates a file when it is unpickled by an ordinary unpickler."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("name", ["system", "exec", "getattr", "loads", "memmap"])
def test_code_is_refused_by_name_and_does_not_run(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "ran"
    calls = {
        "system": (Runs(os.system, f"touch {victim}"), "posix.system"),
        "exec": (Runs(exec, f"open({str(victim)!r}, 'w')"), "builtins.exec"),
        "getattr": (Runs(getattr, os, "system"), "builtins.getattr"),
        "loads": (Runs(pickle.loads, b"N."), "_pickle.loads"),
        "memmap": (Runs(np.memmap, str(victim), "uint8", "w+", 0, (4,)), "numpy.memmap"),
    }
    payload, refused = calls[name]
    if name == "getattr":  # a module does not pickle; its name in a hand-written pickle does
        content = b"cbuiltins\ngetattr\n(cos\nenviron\nS'clear'\ntR(tR."
    else:
        content = pickle.dumps({"model": {"weight": np.ones(2, np.float32), "extra": payload}})
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="refused") as error:
        read_pickle(path)
    assert refused in str(error.value) and "nothing of it was run" in str(error.value)
    assert "\n" not in str(error.value)
    assert not victim.exists() and os.environ


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": np.array([{}, []], dtype=object)}))
    with pytest.raises(UserError, match="'O8'"):
        read_pickle(path)


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    content = pickle.dumps(np.arange(4, dtype=np.float32), protocol=2)
    path = tmp_path / "model.pkl"
    # the shape (4,) as (9,): NumPy's own unpickler would be asked to read past the data
    assert content.count(b"K\x04\x85") == 1
    path.write_bytes(content.replace(b"K\x04\x85", b"K\x09\x85"))
    with pytest.raises(UserError, match="36 bytes with 16"):
        read_pickle(path)


def test_every_truncation_is_a_user_error(tmp_path: Path) -> None:
    content = pickle.dumps({"model": {"weight": np.ones((2, 3), np.float32)}}, protocol=4)
    ends = [position for _, _, position in pickletools.genops(content) if position]
    path = tmp_path / "model.pkl"
    for end in [0, *ends]:
        path.write_bytes(content[:end])
        with pytest.raises(UserError):
            read_pickle(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_pickle(tmp_path / "none.pkl")

"""Reading the model zoo's .pkl files without running anything that they say.

A pickle may name any function of any module and have it called. This reader knows the handful of names that a
pickled NumPy array consists of, and answers each with a stand-in of its own that only records bytes, shape and
type. Everything else in the file is refused by name; not even NumPy's own unpickling code runs.
"""

import codecs
import math
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError

Array = npt.NDArray[Any]
NUMBERS = "biuf"
"""Kinds of NumPy types that are read: bool, integers, floats."""


class _DtypeStub:
    """What `numpy.dtype(code, align, copy)` becomes; its state holds the byte order."""

    def __init__(self, code: object, *_options: object) -> None:
        if not isinstance(code, str) or code[:1] not in NUMBERS or not code[1:].isdigit():
            raise pickle.UnpicklingError(f"arrays of type {code!r}")
        self.code = code
        self.order = "="

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a NumPy type with a byte order that is unknown")
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        """The type itself."""
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]  # one of four, see __setstate__


class _ArrayStub:
    """What `numpy.ndarray` becomes: filled by `__setstate__`, read by `array`."""

    content: Array | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array whose state is unknown")
        _version, shape, dtype, fortran, data = state
        self.content = _array(data, dtype, shape, "F" if fortran else "C")

    def array(self) -> Array:
        """The array."""
        if self.content is None:
            raise pickle.UnpicklingError("an array without content")
        return self.content


def _array(data: object, dtype: object, shape: object, order: str) -> Array:
    """Bytes, type and shape as an array that owns its memory."""
    if isinstance(data, str):  # Python 2's bytes, read as Latin-1
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _DtypeStub):
        raise pickle.UnpicklingError("an array that does not consist of bytes and a type")
    if not isinstance(shape, tuple) or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise pickle.UnpicklingError("an array with an impossible shape")
    expected = math.prod(shape) * dtype.dtype().itemsize
    if len(data) != expected:
        raise pickle.UnpicklingError(f"an array of {expected} bytes with {len(data)}")
    flat = np.frombuffer(data, dtype.dtype())
    return flat.reshape(shape, order="F" if order == "F" else "C").astype(dtype.dtype().newbyteorder("="))


def _reconstruct(_kind: object, _shape: object, _type: object) -> _ArrayStub:
    return _ArrayStub()


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> _ArrayStub:
    stub = _ArrayStub()
    stub.content = _array(data, dtype, shape, "F" if order == "F" else "C")
    return stub


def _scalar(dtype: object, data: object) -> Any:
    return _array(data, dtype, (), "C").item()


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("a text in an encoding other than Latin-1")
    return codecs.latin_1_encode(text)[0]


def _empty_bytes() -> bytes:
    return b""


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    # how the older protocols write the bytes of an empty array
    ("__builtin__", "bytes"): _empty_bytes,
    ("numpy", "dtype"): _DtypeStub,
    ("numpy", "ndarray"): _ArrayStub,
}
for _parent in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_parent}.multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[f"{_parent}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"{_parent}.numeric", "_frombuffer"] = _from_buffer


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler for plain containers of numbers, texts and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name in the file."""
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise pickle.UnpicklingError(f"'{module}.{name}'")
        return admitted

    def persistent_load(self, pid: Any) -> Any:
        """Objects kept outside the file."""
        raise pickle.UnpicklingError(f"a reference to something outside the file ({pid!r})")


def read_pickle(path: str | Path) -> Any:
    """The contents of a pickle that holds NumPy arrays in plain containers.

    Returns:
        Dictionaries, lists, tuples, numbers, texts, and NumPy arrays of numbers.

    Raises:
        UserError: the file is missing or broken, or it holds anything else, which is named; none of it ran.
    """
    try:
        with open(path, "rb") as stream:
            return _without_stubs(_ArrayUnpickler(stream, encoding="latin1").load())
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except (EOFError, struct.error, pickle.UnpicklingError, ValueError, IndexError, KeyError) as error:
        raise _refusal(path, error) from error
    except (AttributeError, TypeError, RecursionError, MemoryError, OverflowError, ImportError) as error:
        # a pickle's opcodes applied to the wrong objects
        raise _refusal(path, error) from error


def _refusal(path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{path}: refused: expected a pickle of NumPy arrays in plain containers, found {reason}; nothing of it was "
        "run. A checkpoint from a source that you trust can be saved as .pth (a state_dict) and imported as that"
    )


def _without_stubs(value: Any) -> Any:
    """The same containers with arrays in place of their stand-ins."""
    if isinstance(value, _ArrayStub):
        return value.array()
    if isinstance(value, dict):
        return {_key(name): _without_stubs(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_stubs(entry) for entry in value)
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return value
    raise pickle.UnpicklingError(f"an object of class '{type(value).__name__}'")


def _key(name: Any) -> Any:
    if not isinstance(name, str | int):
        raise pickle.UnpicklingError(f"a mapping with a key of class '{type(name).__name__}'")
    return name

"""Reading the model zoo's .pkl files without running anything that they say.

A pickle may name any function of any module and have it called. This reader knows the handful of names that a
pickled NumPy array consists of, and answers each with a stand-in of its own that only records bytes, shape and
type. Everything else in the file is refused by name; not even NumPy's own unpickling code runs.

A pickle may also ask for memory: for numbers of places, for arrays again and again out of the same bytes, for
containers that hold each other. It is read by Python's own unpickler, which allocates nothing in advance, and what its
arrays take together is bounded by the size of the file.
"""

import codecs
import io
import math
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError, shown
from norton_deploy.files import require_regular

Array = npt.NDArray[Any]
NUMBERS = "biuf"
"""Kinds of NumPy types that are read: bool, integers, floats."""


class _DtypeStub:
    """What `numpy.dtype(code, align, copy)` becomes; its state holds the byte order."""

    def __init__(self, code: object, *_options: object) -> None:
        if not isinstance(code, str) or code[:1] not in NUMBERS or not code[1:].isdigit():
            raise pickle.UnpicklingError(f"arrays of type {shown(code)}")
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

    content: tuple[object, object, object, str] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array whose state is unknown")
        _version, shape, dtype, fortran, data = state
        self.content = (data, dtype, shape, "F" if fortran else "C")

    def array(self) -> Array:
        """The array."""
        if self.content is None:
            raise pickle.UnpicklingError("an array without content")
        return _array(*self.content)


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
    stub.content = (data, dtype, shape, "F" if order == "F" else "C")
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


class _ArrayUnpickler(pickle._Unpickler):
    """An unpickler for plain containers of numbers, texts and NumPy arrays, written in Python."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Any  # of the stack, while it loads
    read: Any

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name in the file."""
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise pickle.UnpicklingError(f"'{module}.{name}'")
        return admitted

    def persistent_load(self, pid: Any) -> Any:
        """Objects kept outside the file."""
        raise pickle.UnpicklingError(f"a reference to something outside the file ({shown(pid)})")

    def load_build(self) -> None:
        """Give an object its state: only stand-ins take one; an ordered dictionary's attributes are left out."""
        state = self.stack.pop()
        built = self.stack[-1]
        if isinstance(built, _DtypeStub | _ArrayStub):
            built.__setstate__(state)
        elif type(built) is not OrderedDict:
            raise pickle.UnpicklingError(f"a state for {shown(built)}")

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        """Bytes of a stated length, which Python's own method would allocate before it looks for them."""
        (length,) = struct.unpack("<Q", self.read(8))
        content = self.read(min(length, sys.maxsize))
        if len(content) != length:
            raise pickle.UnpicklingError("fewer bytes than it states")
        self.append(bytearray(content))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def read_pickle(path: str | Path) -> Any:
    """The contents of a pickle that holds NumPy arrays in plain containers.

    Returns:
        Dictionaries, lists, tuples, numbers, texts, and NumPy arrays of numbers.

    Raises:
        UserError: the file is missing or broken, or it holds anything else, which is named; none of it ran.
    """
    require_regular(path, "a pickle")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    try:
        value = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        return _Plain(len(content)).value(value)
    except Exception as error:  # opcodes applied to the wrong objects raise anything
        raise _refusal(path, error) from error


def _refusal(path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{path}: refused: expected a pickle of NumPy arrays in plain containers, found {reason}; nothing of it was "
        "run. A checkpoint from a source that you trust can be saved as .pth (a state_dict) and imported as that"
    )


class _Plain:
    """The same containers with arrays in place of their stand-ins; what is shared stays shared."""

    def __init__(self, most_bytes: int) -> None:
        self._bytes_left = most_bytes
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no address in `_made` is used again

    def value(self, value: Any) -> Any:
        """One value and all below it."""
        if value is None or isinstance(value, str | bytes | bool | int | float):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = self._made_of(value)
            self._kept.append(value)
        return self._made[id(value)]

    def _made_of(self, value: Any) -> Any:
        if isinstance(value, _ArrayStub):
            array = value.array()
            self._bytes_left -= array.nbytes
            if self._bytes_left < 0:
                raise pickle.UnpicklingError("arrays that are larger than the file")
            return array
        if isinstance(value, dict):
            return {_key(name): self.value(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self.value(entry) for entry in value])
        raise pickle.UnpicklingError(f"an object of class '{type(value).__name__}'")


def _key(name: Any) -> Any:
    if not isinstance(name, str | int):
        raise pickle.UnpicklingError(f"a mapping with a key of class '{type(name).__name__}'")
    return name

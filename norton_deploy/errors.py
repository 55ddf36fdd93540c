"""The one exception that a user's mistake raises, and the exit status of an interruption."""

import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

INTERRUPTED = 130
"""Exit status, as a shell gives it for SIGINT."""
LONGEST_MESSAGE = 1500
"""Characters."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, layer or field, says what was expected and what to do.
    Commands print it without a traceback and exit with status 1. What files put into it cannot make it more than a
    line, nor steer a terminal: control characters become spaces, and the middle of a very long message is left out.
    """

    def __str__(self) -> str:
        text = _CONTROL.sub(" ", super().__str__()).strip()
        if len(text) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            text = f"{text[:half]} ... {text[-half:]}"
        return text


def shown(value: object) -> str:
    """A value out of a file for a message: its repr, cut to a hundred characters or so."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"a value of type {type(value).__name__}"


def require_least(least: float, **values: float | None) -> None:
    """Options, by name, that must be so much or more where they are given.

    Raises:
        UserError: names the first that is less.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def one_line_errors(loader: Iterable[T]) -> Iterator[T]:
    """The loader's batches.

    Raises:
        UserError: as the dataset raised it (torch would put a worker's whole traceback into its message), or see
            `worker_deaths`.
    """
    try:
        with worker_deaths():
            yield from loader
    except UserError as error:
        raise UserError(str(error.args[0]).rpartition(f"{UserError.__name__}: ")[2]) from None


@contextmanager
def worker_deaths() -> Iterator[None]:
    """torch raises the death of a process that reads data in whatever its parent is doing; here it is one line.

    Raises:
        UserError: one died.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            f"a process that reads images died ({str(error).splitlines()[0].strip()}); too little memory is the usual "
            "reason: give fewer --workers or a smaller --batch-size; a training run goes on with --resume"
        ) from error

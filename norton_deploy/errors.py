"""The one exception that a user's mistake raises."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, layer or field, says what was expected and what to do.
    Commands print it without a traceback and exit with status 1.
    """


def one_line_errors(loader: Iterable[T]) -> Iterator[T]:
    """The loader's batches.

    Raises:
        UserError: as the dataset raised it; torch would put a worker's whole traceback into its message.
    """
    try:
        yield from loader
    except UserError as error:
        last_line = str(error).strip().splitlines()[-1]
        raise UserError(last_line.rpartition(f"{UserError.__name__}: ")[2]) from None

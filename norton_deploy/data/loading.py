"""Iterating over a DataLoader so that a worker's UserError stays the one line that it was."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from norton_deploy.errors import UserError


def iterate(loader: "DataLoader[Any]") -> Iterator[Any]:
    """The loader's batches.

    Raises:
        UserError: as the dataset raised it; torch would put a worker's whole traceback into its message.
    """
    try:
        yield from loader
    except UserError as error:
        last_line = str(error).strip().splitlines()[-1]
        raise UserError(last_line.rpartition(f"{UserError.__name__}: ")[2]) from None

"""How far a long piece of work is: a bar on a terminal, plain lines elsewhere (a log, a pipe, a job's output)."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY_S = 10.0
"""Off a terminal a line is written so often at most."""
OPEN = "{desc}: {n_fmt} {unit}, {elapsed} passed"
"""Where nobody knows of how many."""
PLAIN = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} passed, {remaining} left"


class PlainLines:
    """A stream for tqdm that makes a line of each of its redrawings; one that says the same again is left out."""

    last = ""

    def write(self, text: str) -> None:
        """Whatever tqdm draws, without its control characters."""
        line = text.strip("\r\n\x1b[A ")
        if line and line != self.last:
            self.last = line
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Every line is flushed already."""


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    show: bool = True,
) -> "tqdm[Any]":
    """tqdm's bar on stderr, which goes when it is done; off a terminal a line every `EVERY_S` seconds and at the end.

    Args:
        iterable: what to count; None: `update` counts.
        desc: the work, in a word or two.
        unit: what is counted, "image" or "layer".
        total: how many there are, if the iterable does not say; None: nobody knows.
        initial: how many were done before.
        show: False for no output at all.
    """
    terminal = sys.stderr.isatty()
    looks: dict[str, Any] = {"dynamic_ncols": True, "leave": False}
    if not terminal:
        known = total is not None or hasattr(iterable, "__len__")
        looks = {
            "file": PlainLines(),
            "bar_format": PLAIN if known else OPEN,
            "mininterval": EVERY_S,
            "maxinterval": EVERY_S,
        }
    return tqdm(iterable, desc, total, initial=initial, unit=unit, disable=not show, **looks)

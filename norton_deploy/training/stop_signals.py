"""Ctrl-C, and a service manager's stop, between two steps of a training."""

import signal
import sys
import threading
from typing import Any


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM only sets `received`; a second one acts as ever.

    Processes forked meanwhile (those that read data) do the same, so that Ctrl-C in a terminal, which reaches them
    too, does not end them before the step is done.
    """

    def __init__(self, *, enabled: bool) -> None:
        """With `enabled` False, or outside the main thread, signals act as ever."""
        self.received = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if self._enabled:
            self._previous = {one: signal.signal(one, self._receive) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, _signal: int, _frame: object) -> None:
        self.received = True
        print("stops after this step; once more stops at once, without saving", file=sys.stderr)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *_: object) -> None:
        self._restore()

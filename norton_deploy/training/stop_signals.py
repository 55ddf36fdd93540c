"""Ctrl-C, and a service manager's stop, between two steps of a training."""

import os
import signal
import sys
import threading
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM only sets `received`; a second one acts as ever."""

    def __init__(self, *, enabled: bool) -> None:
        """With `enabled` False, or outside the main thread, signals act as ever."""
        self.received = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if self._enabled:
            self._previous = {one: signal.signal(one, self._receive) for one in STOPS}
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


def outlive_one_stop(_worker: int) -> None:
    """Make this process, which reads data for a training, ignore the first SIGINT or SIGTERM; a second one ends it.

    A terminal sends Ctrl-C, and a service or batch manager its stop, to the readers too; the step that is being done
    needs their data. The training's own SIGTERM, with which it ends readers that are left over, does so at once: hence
    a thread that is told who sends. Called in the reader itself, where torch has a handler of SIGTERM that ends it
    whoever sends; it stays where the system does not tell (macOS).
    """

    def ignored(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ignored)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_meant, args=(os.getppid(),), daemon=True).start()


def _end_when_meant(parent: int) -> None:
    """End the process at the parent's SIGTERM, or at the second one from elsewhere."""
    if signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        signal.sigwaitinfo({signal.SIGTERM})
    os._exit(0)

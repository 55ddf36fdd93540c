"""Steps that are done once: each with an estimate before it, its command, its time, and its result in one file."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError
from norton_deploy.reporting.deployment import StepRecord
from norton_deploy.result_file import ResultFile

RECORD, LOCK = "deploy.json", "deploy.lock"


class Steps:
    """The steps of one run folder, in order; a step whose result and files are there is not repeated.

    Attributes:
        folder: of the run; the results are in its deploy.json.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        count: int,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            folder: of the run.
            settings: what the results depend on, as JSON values.
            count: of all steps, for the messages.
            report: gets every message for people.
            clock: of seconds.

        Raises:
            UserError: the folder has results of other settings, or holds something else.
        """
        record = folder / RECORD
        check_run_folder(folder)
        self._store = ResultFile(record, settings, otherwise="choose another --out, or remove that folder")
        self.folder, self._count, self._report, self._clock = folder, count, report, clock
        self._number = 0

    def run(
        self,
        name: str,
        title: str,
        command: str,
        work: Callable[[], dict[str, Any]],
        *,
        seconds: float,
        products: Sequence[Path] = (),
    ) -> dict[str, Any]:
        """The result of a step: of an earlier run, or of `work` now.

        Args:
            name: of the step in the record.
            title: for people.
            command: that does this step alone.
            work: does it; returns JSON values.
            seconds: estimate of its time.
            products: files that it writes; it is repeated where one is missing.
        """
        self._number += 1
        place = f"[{self._number}/{self._count}] {title}"
        done = self._store.cells.get(name)
        if done is not None and all(product.exists() for product in products):
            self._report(f"{place}: done already")
            result: dict[str, Any] = done["result"]
            return result
        self._report(f"{place}: {in_words(seconds)}\n    $ {command}")
        started = self._clock()
        result = work()
        took = round(self._clock() - started, 1)
        self._store.add({name: {"title": title, "command": command, "seconds": took, "result": result}})
        self._store.save()
        self._report(f"    took {took:.0f} s")
        return result

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """What was done, in order."""
        return tuple(StepRecord(cell["title"], cell["command"], cell["seconds"]) for cell in self._store.cells.values())


def check_run_folder(folder: Path) -> None:
    """
    Raises:
        UserError: the folder holds something that is no deployment.
    """
    if (folder / RECORD).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(f"{folder}: holds something that is no deployment; choose another --out")


def in_words(seconds: float) -> str:
    """An estimate, for people."""
    if seconds < 90:
        return f"about {max(5, round(seconds / 5) * 5)} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


class ProgressLines:
    """Plain lines about work of many parts, at most one every few seconds, from the first part on."""

    def __init__(self, report: Callable[[str], None], every_s: float = 30.0) -> None:
        self._report, self._every_s = report, every_s
        self._stage, self._started, self._told = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` parts of a stage are finished; 0: nobody knows of how many."""
        now = time.monotonic()
        of_all = f"    {stage}: {done} of {total}" if total else f"    {stage}: {done}"
        if stage != self._stage:
            self._stage, self._started, self._told, self._first = stage, now, now, done
            self._report(of_all)
        elif now - self._told >= self._every_s and done > self._first:
            self._told = now
            left = (now - self._started) / (done - self._first) * (total - done)
            self._report(f"{of_all}, {in_words(left)} left" if total else of_all)


def to_stderr(message: str) -> None:
    """Print at once."""
    print(message, file=sys.stderr, flush=True)

"""Results that are kept as they come, so that what takes long is measured once."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, read_json


class ResultFile:
    """Results by name in one JSON file, {"settings": ..., "cells": {name: result}}, all made with the same settings.

    What takes long is measured once: a stopped run goes on with the results that are there.

    Attributes:
        path: the file, or None to keep everything in memory.
        settings: what the results depend on, as JSON values.
        cells: name -> result, as JSON values.
    """

    def __init__(
        self, path: Path | None, settings: Mapping[str, Any], *, resume: bool = True, otherwise: str, every_s: float = 0
    ) -> None:
        """
        Args:
            resume: go on with the file's results where there is one; otherwise it is replaced.
            otherwise: what to do about a file of other settings, for the message.
            every_s: seconds between two writings.

        Raises:
            UserError: the file's results were made with other settings, or it is no such file.
        """
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.cells: dict[str, Any] = {}
        self._every_s, self._saved_s = every_s, time.monotonic()
        if not resume or path is None or not path.is_file():
            return
        found = read_json(path, "a file of results")
        before = found.get("settings") if isinstance(found, dict) else None
        cells = found.get("cells") if isinstance(found, dict) else None
        if not isinstance(before, dict) or not isinstance(cells, dict):
            raise UserError(f"{path}: not a file of results with their settings; {otherwise}")
        self.cells = cells
        for name in sorted(before.keys() | self.settings.keys()):
            old, now = before.get(name), self.settings.get(name)
            if old != now:
                raise UserError(f"{path}: measured with {name} = {old!r}, now it is {now!r}; {otherwise}")

    def add(self, cells: Mapping[str, Any]) -> None:
        """Take results in, and write the file if the last writing is `every_s` ago."""
        self.cells.update(cells)
        if time.monotonic() - self._saved_s >= self._every_s:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self._saved_s = time.monotonic()
        if self.path is not None:
            with atomic_write(self.path, "w") as stream:
                json.dump({"settings": self.settings, "cells": self.cells}, stream, indent=1)
                stream.write("\n")

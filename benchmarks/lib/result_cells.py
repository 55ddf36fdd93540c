"""The results of a benchmark that takes hours: one JSON file of cells, each written as soon as it is measured."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table

Cell = dict[str, Any]


class ResultCells:
    """Cells by name, all measured with the same settings; a cell that is there already is not measured again.

    Args:
        path: JSON file; {"settings": ..., "cells": {name: ...}}.
        settings: what the figures depend on, as plain JSON values without paths.

    Raises:
        UserError: the file's cells were measured with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.cells: dict[str, Cell] = {}
        if path.is_file():
            found = json.loads(path.read_text())
            for name in sorted(found["settings"].keys() | self.settings.keys()):
                before, now = found["settings"].get(name), self.settings.get(name)
                if before != now:
                    raise UserError(
                        f"{path}: its cells were measured with {name} = {before!r}, now it is {now!r}; "
                        "give the old value or another --out"
                    )
            self.cells = found["cells"]

    def measure(self, name: str, run: Callable[[], Cell]) -> Cell:
        """The cell `name`: from the file, or from `run`, then written with its duration and provenance."""
        if name not in self.cells:
            print(f"== {name}", file=sys.stderr, flush=True)
            started = time.perf_counter()
            cell = run()
            seconds = round(time.perf_counter() - started, 1)
            self.cells[name] = {**cell, "seconds": seconds, "provenance": provenance()}
            with atomic_write(self.path, "w") as stream:
                json.dump({"settings": self.settings, "cells": self.cells}, stream, indent=1)
                stream.write("\n")
        return self.cells[name]

    def write_markdown(self, tables: list[Table], notes: str) -> None:
        """Write tables and a paragraph below them beside the JSON file, as .md."""
        parts = [*(table.to_markdown() for table in tables), notes]
        with atomic_write(self.path.with_suffix(".md"), "w") as stream:
            stream.write("\n\n".join(parts) + "\n")

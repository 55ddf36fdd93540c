"""What was found in each image so far, kept as it comes: a stopped run goes on at the image where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError

SUFFIX = ".parts"


@dataclass(frozen=True)
class Processes:
    """Those that share the images; alone by default.

    Attributes:
        rank, count: of this process, of all.
        gather: everybody's lists, joined, to everybody; returns when all have called it.
        device: that this process shall use; None: as ever.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda own: own
    device: str | None = None


def joined_processes() -> Processes:
    """torchrun's processes, or this one alone, for which nothing of torch is loaded."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    has_gpu = torch.cuda.is_available()
    state = PartialState(cpu=not has_gpu)
    return Processes(state.process_index, state.num_processes, gather_object, str(state.device) if has_gpu else "cpu")


class ImageJournal:
    """Records of images, one JSON line each, in a file for each process and start.

    Args:
        folder: of the files, beside what they become.
        identity: what the records depend on, as JSON values.
        resume: go on with what a stopped run left.
        overwrite: throw that away; with `resume` only where it is of another run.
        processes: all of them make one, with the same arguments.

    Attributes:
        done: image id -> record, of stopped runs.

    Raises:
        UserError: something was left and it is not said what to do with it, or it is of another run; or the folder
            cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.folder, processes = folder, processes or Processes()
        head = json.loads(json.dumps({"of": identity}))
        if self._files() and not (resume or overwrite):
            raise UserError(f"{folder}: a stopped run left this; --resume goes on, --overwrite begins anew")
        heads = [_parsed(lines[0]) for lines in map(_lines, self._files()) if lines]
        foreign = any(found not in (head, None) for found in heads)
        if foreign and not overwrite:
            raise UserError(f"{folder}: of another model, other data or settings; --overwrite begins anew")
        processes.gather([])
        if processes.rank == 0 and (foreign or not resume):
            self._clear()
        processes.gather([])
        files = self._files()
        self.done: dict[int, Any] = {}
        for file in files:
            found = filter(None, map(_parsed, _lines(file)[1:]))
            self.done |= {record["id"]: record["found"] for record in found}
        processes.gather([])  # nobody writes before all have read
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = open(folder / f"{len(files):04d}-{processes.rank}.jsonl", "x", encoding="utf-8")  # noqa: SIM115  closed in remove
            self._write(head)
        except OSError as error:
            raise UserError(f"{folder}: cannot write here ({error.strerror})") from error

    def add(self, image_id: int, found: Any) -> None:
        """Keep an image's record, JSON values, at once.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._write({"id": image_id, "found": found})
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); make room, --resume goes on"
            ) from error

    def remove(self) -> None:
        """All is in its place now."""
        self._stream.close()
        self._clear()

    def _clear(self) -> None:
        for file in self._files():
            file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*-*.jsonl"))

    def _write(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines()


def _parsed(line: str) -> Any:
    """None for a line that a kill has cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None

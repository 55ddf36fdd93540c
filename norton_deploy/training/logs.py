"""What a run reports: JSON lines for programs, TensorBoard for eyes, on the main process only."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from norton_deploy.files import atomic_write


class RunLog:
    """Appends one JSON object a line, and the same numbers to TensorBoard.

    A resumed run repeats the steps after its saved state: their old lines are cut off first, so that each
    step stands in the log once.

    Args:
        log: the JSON-lines file.
        tensorboard: folder of event files.
        first_step: steps done before; lines of later ones are dropped.
        enabled: False on all processes but the main one.
    """

    def __init__(self, log: Path, tensorboard: Path, *, first_step: int, enabled: bool) -> None:
        self._stream = None
        if not enabled:
            return
        if log.exists():
            _keep_until(log, first_step)
        self._stream = open(log, "a", encoding="utf-8")  # noqa: SIM115  closed in __exit__
        self._board = SummaryWriter(str(tensorboard), purge_step=first_step + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._board.close()

    def write(self, section: str, step: int, values: Mapping[str, Any]) -> None:
        """Log one record.

        Args:
            section: "train" or "evaluation"; also the prefix of the names in TensorBoard.
            step: steps done.
            values: numbers, or one level of dictionaries of numbers.
        """
        if self._stream is None:
            return
        self._stream.write(json.dumps({"section": section, "step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            numbers = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, number in numbers:
                if isinstance(number, int | float):
                    self._board.add_scalar("/".join(filter(None, (section, name, key))), number, step)
        self._board.flush()


def _keep_until(log: Path, last_step: int) -> None:
    """Rewrite the log without the lines of later steps, and without a last line cut off by a kill."""
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= last_step:
            kept.append(line + "\n")
    with atomic_write(log, "w") as stream:
        stream.writelines(kept)

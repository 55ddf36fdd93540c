"""What a training run tells: log.jsonl in its folder, and TensorBoard, W&B, MLflow or trackio."""

import json
import threading
import time
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from norton_deploy.config import flatten
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.training.run_folder import RunFolder, read_settings

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
PROJECT = "norton_deploy"
"""What W&B and trackio call the project and MLflow the experiment of all runs."""


def check_tracker(tracker: Tracker) -> None:
    """
    Raises:
        UserError: its package is not installed.
    """
    if find_spec(tracker) is None:
        raise UserError(f"--tracker {tracker}: the package {tracker} is not installed; pip install {tracker}")


class RunLog:
    """Appends one JSON object a line, and gives the same numbers to a tracker (accelerate's).

    A resumed run repeats the steps after its saved state: their old lines are cut off first, so that each
    step stands in the log once.

    Args:
        first_step: steps done before; lines of later ones are dropped.
        evaluated_step: of the last evaluation that the state knows; later ones are made again, their lines dropped.
        enabled: False on all processes but the main one.
        tracker: TensorBoard's events lie in the run's folder; the others keep their own place, where a resumed run is a
            new one of the same name. One that fails on the way is left with a warning.

    Raises:
        UserError: the log cannot be written, or the tracker cannot be started.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        first_step: int,
        evaluated_step: int,
        enabled: bool,
        tracker: Tracker = "tensorboard",
    ) -> None:
        self._stream = None
        self._path = folder.log
        self._tracker: GeneralTracker | None = None
        self._thread_errors = threading.excepthook
        self.start_interval()
        if not enabled:
            return
        if folder.log.exists():
            _keep_until(folder.log, first_step, evaluated_step)
        threading.excepthook = self._from_thread
        try:
            self._stream = open(folder.log, "a", encoding="utf-8")  # noqa: SIM115  closed in __exit__
            self._tracker = _started(tracker, folder, first_step)
        except OSError as error:
            self.__exit__(type(error))
            raise self._unwritable(error) from error

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        threading.excepthook = self._thread_errors
        if self._stream is None:
            return
        for close in (self._stream.close, *([] if self._tracker is None else [self._tracker.finish])):
            try:
                close()
            except OSError as error:  # on a full disk closing fails once more
                if kind is None:
                    raise self._unwritable(error) from error

    def _from_thread(self, arguments: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands what it cannot write to `write`, and raises it besides."""
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            self._thread_errors(arguments)

    def _unwritable(self, error: OSError) -> UserError:
        paths = f"{self._path} or {self._path.parent}"
        return UserError(f"{paths}: cannot be written ({error.strerror}); make room and go on with --resume")

    def start_interval(self) -> None:
        """Forget the steps since the last line."""
        self._started, self._steps, self._images = time.perf_counter(), 0, 0
        self._losses: dict[str, float] = {}

    def add_step(self, losses: Mapping[str, float], images: int) -> None:
        """Count a step with its losses and its images, over all processes."""
        self._steps += 1
        self._images += images
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + value

    def write_interval(self, step: int, **values: float) -> None:
        """Log the means of the steps since the last line, and `values` of the last one."""
        losses = {name: value / self._steps for name, value in self._losses.items()}
        speed = self._images / (time.perf_counter() - self._started)
        self.write("train", step, {**values, "losses": losses, "images_per_s": speed})
        self.start_interval()

    def write(self, section: str, step: int, values: Mapping[str, Any]) -> None:
        """Log one record.

        Args:
            section: "train" or "evaluation"; also the prefix of the names in the tracker.
            values: numbers, or one level of dictionaries of numbers.

        Raises:
            UserError: the log or TensorBoard's events cannot be written, on a full disk for example.
        """
        if self._stream is None:
            return
        try:
            self._write(section, step, values)
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, section: str, step: int, values: Mapping[str, Any]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps({"section": section, "step": step, **values}) + "\n")
        self._stream.flush()
        if self._tracker is None:
            return
        named = {name.replace(".", "/"): value for name, value in flatten({section: values}).items()}
        numbers = {name: value for name, value in named.items() if isinstance(value, int | float)}
        try:
            self._tracker.log(numbers, step)
        except Exception as error:  # each service has its own
            if self._tracker.name == "tensorboard":
                raise
            warnings.warn(f"{self._tracker.name} failed ({error}); the run goes on, see {self._path}", stacklevel=2)
            self._tracker = None


def read_log(log: Path) -> tuple[dict[str, Any], ...]:
    """The records of a log.jsonl: "section" ("train" or "evaluation"), "step" and what `RunLog.write` was given; a
    last line cut off by a kill is left out."""
    records = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return tuple(records)


def _keep_until(log: Path, last_step: int, evaluated_step: int) -> None:
    """Rewrite the log without the lines of later steps, and without a last line cut off by a kill."""
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            last = evaluated_step if record["section"] == "evaluation" else last_step
            if record["step"] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_write(log, "w") as stream:
        stream.writelines(kept)


def _started(tracker: Tracker, folder: RunFolder, first_step: int) -> GeneralTracker:
    if tracker == "tensorboard":
        values: dict[str, Any] = {"logging_dir": folder.root, "purge_step": first_step + 1}
        made = LOGGER_TYPE_TO_CLASS[tracker](folder.tensorboard.name, **values)
        made.start()
        return made
    name = {"run_name" if tracker == "mlflow" else "name": folder.root.resolve().name}
    try:
        made = LOGGER_TYPE_TO_CLASS[tracker](PROJECT, **name)
        made.start()
        made.store_init_configuration(flatten(read_settings(folder.settings)))
    except Exception as error:  # each service has its own: no login, no network, a server that refuses
        raise UserError(f"--tracker {tracker}: cannot be started ({' '.join(str(error).split())})") from error
    return made

"""The folder of a training run: who may write there, and the state from which it continues bit for bit."""

import json
import random
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from norton_deploy.config import flatten
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, read_json, remove_partials
from norton_deploy.folder_lock import held

FORMAT = 2
RUN_MARK = {"batch_size", "lr", "seed"}
"""Settings that every run writes."""


class RunFolder:
    """Paths of a run.

    Attributes:
        settings: settings of the run as JSON; its presence marks the folder as a run's.
        state: what --resume continues from.
        log, tensorboard: JSON lines; TensorBoard's event files.
        last, best: checkpoints of the newest weights, and of those with the best evaluation.
        non_finite: the batch at which the loss stopped being finite.
        lock: who trains here, or was the last to do so; held by the process while it does.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings, self.state = root / "settings.json", root / "state.pt"
        self.log, self.tensorboard = root / "log.jsonl", root / "tensorboard"
        self.last, self.best = root / "last.safetensors", root / "best.safetensors"
        self.non_finite, self.lock = root / "non_finite.json", root / "run.lock"

    @property
    def files(self) -> tuple[Path, ...]:
        """All that a run writes, but for TensorBoard's events and the lock."""
        return (self.state, self.log, self.last, self.best, self.non_finite, self.settings)

    def held(self) -> AbstractContextManager[None]:
        """Keep every other process out meanwhile (`held`)."""
        return held(self.lock, "trains here")

    def claim(self, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make the folder this run's own; called by the main process, which holds it, before anything is written.

        --overwrite takes what a run wrote and nothing else, and only where a run's settings lie; of TensorBoard the
        event files, and of a link the link. What a killed run left half written goes in any case.

        Raises:
            UserError: a run is there already and neither `resume` nor `overwrite` is set, there is
                nothing to resume, what there is has other settings, or the files there are no run's.
        """
        for path in self.files:
            remove_partials(path)
        if resume:
            if not self.settings.is_file():
                raise UserError(f"{self.root}: no run to resume here; start it without --resume")
            if not self.state.exists():  # a state has its own settings, which are compared when it is read
                check_identity(self.settings, read_json(self.settings, "the settings of a run"), settings)
            self.non_finite.unlink(missing_ok=True)
            return
        present = [path for path in (*self.files, self.tensorboard) if path.exists() or path.is_symlink()]
        if present and self.settings not in present:
            raise UserError(
                f"{present[0]}: is in the way and no run's ({self.settings.name} is missing); choose another --out"
            )
        if present and not overwrite:
            raise UserError(
                f"{self.root}: holds a run already ({present[0].name}); continue it with --resume, "
                "replace it with --overwrite, or choose another --out"
            )
        if present:
            read_settings(self.settings)
            self._remove_run()
        with atomic_write(self.settings, "w") as stream:
            stream.write(json.dumps(settings, indent=2) + "\n")

    def _remove_run(self) -> None:
        """Settings last, so that what a kill leaves is still a run's."""
        if self.tensorboard.is_symlink():
            self.tensorboard.unlink()
        elif self.tensorboard.is_dir():
            for path in self.tensorboard.glob("events.out.tfevents.*"):
                path.unlink()
            if not any(self.tensorboard.iterdir()):
                self.tensorboard.rmdir()
        for path in self.files:
            path.unlink(missing_ok=True)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a run wrote.

    Raises:
        UserError: the file cannot be read or is no run's.
    """
    settings = read_json(path, "the settings of a run")
    if not isinstance(settings, dict) or not settings.keys() >= RUN_MARK:
        raise UserError(f"{path}: not the settings of a run (no {', '.join(sorted(RUN_MARK))}); choose another --out")
    return settings


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPU) for one step of one process.

    Whatever a step draws, such as the anchors and proposals that torchvision samples for its losses, then
    depends on (seed, step, rank) alone: no generator state has to be saved, and none can go stale.
    """
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


@dataclass(frozen=True)
class RunState:
    """Everything that the next step depends on, besides the settings.

    Attributes:
        step: optimizer steps done.
        epoch, batch: the current pass over the data, from 0, and the batches of it that each process has done.
        best: the best score so far, None before the first evaluation.
        evaluated_step, metrics: of the last evaluation; -1 before the first.
        identity: the settings that decide the weights and the number of processes.
        model, optimizer, scaler: state dicts; None without fp16.
    """

    step: int
    epoch: int
    batch: int
    best: float | None
    evaluated_step: int
    metrics: dict[str, dict[str, float]]
    identity: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None


def save_state(path: Path, state: RunState) -> None:
    """Write the state whole or not at all; it holds tensors and plain containers only.

    Raises:
        UserError: it cannot be written, on a full disk for example; the old one stays.
    """
    with atomic_write(path) as stream:
        try:
            torch.save({"format": FORMAT, **vars(state)}, stream)
        except RuntimeError as error:  # what torch makes of an OSError, or of an interruption
            stream.flush()  # raises what the system said, if it was that
            reason = str(error.__context__ or error).splitlines()[0]
            raise UserError(f"{path}: cannot be written ({reason}); the state before stays") from error


def load_state(path: Path, identity: dict[str, Any]) -> RunState:
    """Read a state and check that it belongs to a run with the same settings.

    Raises:
        UserError: the file is not a state, or a setting differs; the message names the setting.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content.pop("format")
    except Exception as error:  # torch.load has no common base class for what it raises
        raise broken_state(path) from error
    if found != FORMAT:
        raise UserError(f"{path}: state format {found}, this version reads {FORMAT}")
    try:
        state = RunState(**content)
        if not all(type(getattr(state, name)) is int for name in ("step", "epoch", "batch", "evaluated_step")):
            raise ValueError("counts that are no integers")
        if not all(isinstance(getattr(state, name), dict) for name in ("metrics", "identity", "model", "optimizer")):
            raise ValueError("parts that are no mappings")
    except (TypeError, ValueError) as error:
        raise broken_state(path) from error
    check_identity(path, state.identity, identity)
    return state


def broken_state(path: Path) -> UserError:
    """What to say of a state that cannot be taken up."""
    return UserError(
        f"{path}: not a whole state of a run; start a new run from the folder's last.safetensors "
        "(--init FILE --out NEW), or replace the run with --overwrite"
    )


def check_identity(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings.

    Raises:
        UserError: a setting differs, or what there is holds no settings; the message names it (and the file that holds
            the old ones, `path`).
    """
    if not isinstance(before, dict):
        raise UserError(
            f"{path}: holds no settings of a run; replace the run with --overwrite, or choose another --out"
        )
    old, new = ({name: _listed(value) for name, value in flatten(values).items()} for values in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"{path}: --resume continues the same run, but '{name}' was {old.get(name)!r} and is now "
                f"{new.get(name)!r}; give the old value, or start a new run with --init"
            )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

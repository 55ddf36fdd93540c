"""The state of a run, saved so that a killed run continues bit for bit."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from norton_deploy.config import flatten
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write

FORMAT = 1


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
        epoch: the current pass over the data, from 0.
        batch: batches of that pass that each process has done.
        best: the best value of the watched metric so far, None before the first evaluation.
        evaluated_step: the step of the last evaluation, -1 before the first.
        metrics: the last evaluation's metrics.
        identity: the settings that decide the weights and the number of processes.
        model: state dict of the model.
        optimizer: state dict of the optimizer.
        average: state dict of the moving average of the weights, if there is one.
        scaler: state dict of the gradient scaler (fp16), if there is one.
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
    average: dict[str, Any] | None
    scaler: dict[str, Any] | None


def save_state(path: Path, state: RunState) -> None:
    """Write the state whole or not at all; it holds tensors and plain containers only."""
    content = {name: getattr(state, name) for name in RunState.__dataclass_fields__}
    with atomic_write(path) as stream:
        torch.save({"format": FORMAT, **content}, stream)


def load_state(path: Path, identity: dict[str, Any]) -> RunState:
    """Read a state and check that it belongs to a run with the same settings.

    Raises:
        UserError: the file is not a state, or a setting differs; the message names the setting.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content.pop("format")
        state = RunState(**content)
    except Exception as error:  # torch.load has no common base class for what it raises
        raise UserError(
            f"{path}: not a whole state of a run; start a new run from the folder's last.safetensors "
            "(--init FILE --out NEW), or replace the run with --overwrite"
        ) from error
    if found != FORMAT:
        raise UserError(f"{path}: state format {found}, this version reads {FORMAT}")
    check_identity(path, state.identity, identity)
    return state


def check_identity(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings.

    Raises:
        UserError: a setting differs; the message names it (and the file that holds the old ones, `path`).
    """
    old, new = ({name: _listed(value) for name, value in flatten(values).items()} for values in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"{path}: --resume continues the same run, but '{name}' was {old.get(name)!r} and is now "
                f"{new.get(name)!r}; give the old value, or start a new run with --init"
            )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""The folder of a training run: what lies in it, and who may write there."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.training.resume import check_identity


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run: settings.json, state.pt, log.jsonl, tensorboard/, last and best .safetensors."""

    root: Path

    @property
    def settings(self) -> Path:
        """Settings of the run as JSON; its presence marks the folder as a run's."""
        return self.root / "settings.json"

    @property
    def state(self) -> Path:
        """State that --resume continues from."""
        return self.root / "state.pt"

    @property
    def log(self) -> Path:
        """JSON-lines log."""
        return self.root / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def last(self) -> Path:
        """Checkpoint of the newest weights."""
        return self.root / "last.safetensors"

    @property
    def best(self) -> Path:
        """Checkpoint of the weights with the best evaluation."""
        return self.root / "best.safetensors"

    @property
    def non_finite(self) -> Path:
        """The batch at which the loss stopped being finite."""
        return self.root / "non_finite.json"

    def claim(self, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make the folder this run's own; called by the main process before anything is written.

        Raises:
            UserError: a run is there already and neither `resume` nor `overwrite` is set, there is
                nothing to resume, or what there is has other settings.
        """
        if resume:
            if not self.settings.is_file():
                raise UserError(f"{self.root}: no run to resume here; start it without --resume")
            if not self.state.exists():  # a state has its own settings, which are compared when it is read
                check_identity(self.settings, json.loads(self.settings.read_text()), settings)
            self.non_finite.unlink(missing_ok=True)
            return
        present = [path for path in self._all() if path.exists()]
        if present and not overwrite:
            raise UserError(
                f"{self.root}: holds a run already ({present[0].name}); continue it with --resume, "
                "replace it with --overwrite, or choose another --out"
            )
        for path in present:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        with atomic_write(self.settings, "w") as stream:
            stream.write(json.dumps(settings, indent=2) + "\n")

    def _all(self) -> tuple[Path, ...]:
        return (
            self.state,
            self.log,
            self.tensorboard,
            self.last,
            self.best,
            self.non_finite,
            self.settings,
        )

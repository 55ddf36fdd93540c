"""Commands as the steps of an experiment: each is run once, and again only where it did not come to its end."""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.commands import run, write_json
from norton_deploy.errors import UserError

INTERRUPTED = 130


@dataclass(frozen=True)
class Steps:
    """The steps of one experiment.

    Attributes:
        root: folder below which all steps write; their records (command, seconds) are in root/steps.
    """

    root: Path

    def run(
        self, name: str, argv: Sequence[str], product: Path, *, title: str | None = None, once: Sequence[str] = ()
    ) -> str:
        """Run a command, unless it has been run with these arguments and its product is there.

        Args:
            name: of the command.
            argv: its arguments.
            product: the file or folder below root that it writes last.
            title: to print before the command, by default nothing.
            once: further arguments of this very call.

        Returns:
            The command as a user would type it.

        Raises:
            UserError: it has been run with other arguments, or fails.
            KeyboardInterrupt: it was interrupted.
        """
        command = f"tools/{name}.py {shlex.join(argv)}"
        record = self.root / "steps" / f"{product.relative_to(self.root).as_posix()}.json"
        if record.is_file() and product.exists():
            if json.loads(record.read_text())["command"] != command:
                raise UserError(
                    f"{product}: was made by another command (see {record}); choose another folder, or delete "
                    f"{self.root}"
                )
            if title is not None:
                print(f"\n{title}: done already", flush=True)
            return command
        print("\n" if title is None else f"\n{title}\n", f"$ {command}", sep="", flush=True)
        started = time.perf_counter()
        status = run(name, [*argv, *once])
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            raise UserError(f"failed: {command}")
        write_json({"command": command, "seconds": round(time.perf_counter() - started, 1)}, record)
        return command

    def train(self, name: str, argv: Sequence[str], folder: Path, *, title: str | None = None) -> str:
        """Run a training command into `folder`, from its last state where there is one; see `run`.

        The metrics of its last evaluation are in folder/metrics.json then.
        """
        product = folder / "metrics.json"
        begun = (folder / "settings.json").is_file()
        once = [] if not begun else ["--resume" if (folder / "state.pt").is_file() else "--overwrite"]
        return self.run(name, [*argv, "--out", str(folder), "--json", str(product)], product, title=title, once=once)

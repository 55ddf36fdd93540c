"""One module per command: typed settings, one call into the package, what to print."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, sha256_of

INTERRUPTED = 130


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the command `name` and return its exit status; a `UserError` becomes one line on stderr."""
    try:
        return int(import_module(f"norton_deploy.commands.{name}").main(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """The command as a user would type it again, for a checkpoint's lineage and for result files."""
    return shlex.join([f"tools/{name}.py", *(sys.argv[1:] if argv is None else argv)])


def write_json(data: Any, target: Path | None) -> None:
    """Write `data` as JSON to a file, to stdout when `target` is '-', or nowhere when it is None."""
    if target is None:
        return
    text = json.dumps(data, indent=2)
    if str(target) == "-":
        print(text)
        return
    with atomic_write(target, "w") as stream:
        stream.write(text + "\n")


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
        """Run a command, unless it has been run with these arguments (and contents of YAML files among them) and its
        product is there.

        Args:
            name: of the command.
            argv: its arguments.
            product: the file or folder below root that it writes last.
            title: to print before the command, by default nothing.
            once: further arguments of this very call.

        Returns:
            The command as a user would type it.

        Raises:
            UserError: it has been run with other arguments or contents, or fails.
            KeyboardInterrupt: it was interrupted.
        """
        command = f"tools/{name}.py {shlex.join(argv)}"
        record = self.root / "steps" / f"{product.relative_to(self.root).as_posix()}.json"
        contents = {
            argument: sha256_of(argument)
            for option, argument in pairwise(["", *argv])
            if argument.endswith(".yaml") and option != "--out" and Path(argument).is_file()
        }
        if record.is_file() and product.exists():
            before = json.loads(record.read_text())
            if before["command"] != command or before.get("contents", contents) != contents:
                raise UserError(
                    f"{product}: was made by another command or other YAML files (see {record}); choose another "
                    f"folder, or delete {self.root}"
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
        seconds = round(time.perf_counter() - started, 1)
        write_json({"command": command, "contents": contents, "seconds": seconds}, record)
        return command

    def train(self, name: str, argv: Sequence[str], folder: Path, *, title: str | None = None) -> str:
        """Run a training command into `folder`, from its last state where there is one; see `run`.

        The metrics of its last evaluation are in folder/metrics.json then.
        """
        product = folder / "metrics.json"
        begun = (folder / "settings.json").is_file()
        once = [] if not begun else ["--resume" if (folder / "state.pt").is_file() else "--overwrite"]
        return self.run(name, [*argv, "--out", str(folder), "--json", str(product)], product, title=title, once=once)


def main() -> None:
    """Entry point `norton COMMAND ...`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: norton COMMAND [--help] ...\n\ncommands: " + ", ".join(names))
        sys.exit(0)
    name = arguments[0].replace("-", "_")
    if name not in names:
        print(f"error: unknown command '{arguments[0]}'; commands: {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(name, arguments[1:]))

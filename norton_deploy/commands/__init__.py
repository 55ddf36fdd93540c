"""One module per command: typed settings, one call into the package, what to print.

`norton NAME` and, in a clone, `tools/NAME.py` start them.
"""

import json
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from norton_deploy.errors import INTERRUPTED, UserError
from norton_deploy.files import atomic_write
from norton_deploy.option_help import first_sentence, help_text

READER_GONE = 141
"""Exit status, as a shell gives it for SIGPIPE."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is written."""

    overwrite: bool = False
    """Replace the files that are to be written if they are there already."""
    json: Path | None = None
    """Write the figures as JSON to a file, or to stdout with '-'."""


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the command `name` and return its exit status; a `UserError` becomes one line on stderr.

    SIGTERM ends it as Ctrl-C does, unless the command has its own way to stop.
    """
    # Before torch is loaded: its waiting threads would spin, and beside other work take the core that they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    def work() -> int:
        if {"--help", "-h"} & set(sys.argv[1:] if argv is None else argv):
            print(help_text(name))
            return 0
        return int(import_module(f"norton_deploy.commands.{name}").main(argv))

    try:
        with _stopped_by_sigterm():
            return _status_of(work)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _status_of(work: Callable[[], int]) -> int:
    """Of what prints; quiet where its reader, such as `head`, has read enough."""
    try:
        status = work()
        sys.stdout.flush()
    except BrokenPipeError:
        waiting = select.poll()
        waiting.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in waiting.poll(0)):
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it ends
        return READER_GONE
    return status


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """The command as a user would type it again, for a checkpoint's lineage and for result files."""
    return shlex.join(["norton", name, *(sys.argv[1:] if argv is None else argv)])


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


def main() -> None:
    """Entry point `norton COMMAND ...`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(_status_of(lambda: _list_commands(names)))
    name = arguments[0].replace("-", "_")
    if name not in names:
        print(f"error: unknown command '{arguments[0]}'; commands: {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(name, arguments[1:]))


def _list_commands(names: Sequence[str]) -> int:
    print("usage: norton COMMAND [--help] ...\n")
    print("\n".join(f"  {name:18}{first_sentence(name)}" for name in names))
    return 0

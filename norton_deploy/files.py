"""Writing files and folders whole or not at all; naming them by their content; reading JSON, and using names as paths,
that a stranger may have written."""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import quote

from norton_deploy.errors import UserError, shown

LONGEST_NAME = 255
"""Bytes in a component of a path, in every file system of today."""
LONGEST_COMPONENT = 100
"""Bytes of a component that is made from a name."""
MAX_VALUES = 1_000_000
MAX_DEPTH = 100
"""Largest tree of settings, see `check_tree`."""
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}

PARTIAL = ".partial"
"""How the names of files and folders end that are not whole yet: .NAME.XXXXXXXX.partial, beside NAME."""


def give_usual_rights(path: str | Path) -> None:
    """Those of a new file or folder by the process's umask; a temporary one is its owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~umask)


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path`; on success fsync it and rename it to `path`.

    A reader therefore sees the old file or the new one, never half of one; after an exception `path` is
    untouched and the neighbour is gone.

    Raises:
        UserError: the folder cannot be made or written to, the disk is full, or `path` is a folder.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, neighbour = tempfile.mkstemp(PARTIAL, f".{target.name}.", target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot write here ({error.strerror}); choose another place") from error
    try:
        with os.fdopen(descriptor, mode) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        give_usual_rights(neighbour)
        os.replace(neighbour, target)
    except BaseException as error:
        Path(neighbour).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{target}: cannot be written ({error.strerror})") from error
        raise


def remove_partials(target: Path) -> None:
    """Remove what killed writers of `target` left beside it, files of `atomic_write` and folders of `new_folder`.

    Only for what nothing else writes meanwhile. Names are matched exactly: a `.NAME.partial` of somebody else stays.
    """
    mark = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}")
    if not target.parent.is_dir():
        return
    for path in [path for path in target.parent.iterdir() if mark.fullmatch(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_output_file(path: Path | None, option: str, suffix: str = "", *, overwrite: bool) -> None:
    """Say before the work, not after it, that a file cannot be written, or is there already; None and "-" (stdout) can.
    What killed writers of it left is removed.

    Args:
        option: its option on the command line, for the message.
        suffix: the ending that its name must have.
        overwrite: whether it may replace the file that is there.

    Raises:
        UserError: the name ends otherwise, it is a folder, it is there and may not be replaced, or its folder cannot be
            made or written to.
    """
    if path is None or str(path) == "-":
        return
    if not path.name.endswith(suffix):
        raise UserError(f"{option} {path}: expected a name that ends in {suffix}")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; expected the name of a file")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {path}: is there already; choose another name, or replace it with --overwrite")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: cannot write in {folder}; choose another place")
    remove_partials(path)


def refuse_same_file(out: Path, *inputs: Path | None) -> None:
    """Keep a command from replacing what it reads.

    Raises:
        UserError: `out` is one of the inputs (None is left out), by whatever path.
    """
    for path in inputs:
        if path is not None and path.is_file() and out.exists() and out.samefile(path):
            raise UserError(f"{out}: is read by this very command and would be lost; choose another name to write to")


def check_output_folder(path: Path, *, replaces: str | None = None) -> None:
    """Say before the work that a folder is there already.

    Args:
        replaces: a folder that holds a file of this name may be replaced.

    Raises:
        UserError: `path` holds something else.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if replaces is None:
        raise UserError(f"{path}: holds something already; remove it or choose another folder")
    if not (path / replaces).is_file():
        raise UserError(f"{path}: holds something else (no {replaces}), and stays; choose another folder")


@contextmanager
def new_folder(path: str | Path, *, replaces: str | None = None) -> Iterator[Path]:
    """A hidden neighbour of `path` to fill; on success it is renamed to `path`, after an exception it is gone.

    What a killed run left behind is removed first.

    Args:
        replaces: a folder that holds a file of this name is replaced; see `check_output_folder`.

    Raises:
        UserError: `path` holds something already, or its parent cannot be written to.
    """
    target = Path(path)
    check_output_folder(target, replaces=replaces)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(target)
        neighbour = Path(tempfile.mkdtemp(PARTIAL, f".{target.name}.", target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot write here ({error.strerror}); choose another place") from error
    try:
        yield neighbour
        give_usual_rights(neighbour)
        if target.exists():
            shutil.rmtree(target)
        neighbour.rename(target)
    except BaseException:
        shutil.rmtree(neighbour, ignore_errors=True)
        raise


def require_regular(path: str | Path, expected: str) -> None:
    """Refuse what would block for ever or hold no bytes: folders, pipes, sockets, devices.

    Args:
        path: of the file to be read.
        expected: what should be there, for the message, for example "a picture".

    Raises:
        UserError: nothing is there, or no regular file.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot read ({reason})") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is a {_KINDS.get(stat.S_IFMT(mode), 'device')}; expected {expected}")


def read_text(path: str | Path, expected: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        UserError: see `require_regular`; or it cannot be read, or is not UTF-8.
    """
    require_regular(path, expected)
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text ({error}); expected {expected}") from error


def parse_json(text: str | bytes, source: str) -> Any:
    """JSON values, of any depth and length that Python reads.

    Raises:
        UserError: it is no JSON, nested too deeply, or has integers of thousands of digits; names `source`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}); is the file complete?") from error


def read_json(path: str | Path, expected: str) -> Any:
    """The values in a JSON file.

    Args:
        expected: what it should be, for messages.

    Raises:
        UserError: see `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, expected), str(path))


def check_tree(value: Any, source: str) -> None:
    """Refuse containers that are too deep or, followed through everything they share, too large to walk.

    YAML's aliases and pickles let a short file describe a tree of any size.

    Raises:
        UserError: more than `MAX_DEPTH` levels or `MAX_VALUES` values; names `source`.
    """
    count, level = 0, [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, Mapping):
                below += entry.values()
            elif isinstance(entry, list | tuple | set | frozenset):
                below += entry
            if count + len(below) > MAX_VALUES:
                raise UserError(f"{source}: holds more than {MAX_VALUES} values, counting what it repeats; simplify it")
        if not below:
            return
        count, level = count + len(below), below
    raise UserError(f"{source}: is nested more than {MAX_DEPTH} levels deep; simplify it")


def path_component(name: str) -> str:
    """A name out of data (a category, for example) as one component of a path.

    Letters, digits and a few signs stay and a space becomes "_"; everything else, a leading dot too, is
    percent-encoded. Of names that come out longer than 100 bytes the end is replaced by a digest. Names that differ
    in more than spaces and underscores stay different.

    Raises:
        UserError: the name is empty.
    """
    if not name:
        raise UserError("an empty name cannot become the name of a file or folder; give it one")
    kept = "".join("_" if c == " " else c if c.isalnum() or c in "-_.,+()" else _encoded(c) for c in name)
    if kept.startswith("."):
        kept = _encoded(".") + kept[1:]
    if len(kept.encode()) <= LONGEST_COMPONENT:
        return kept
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{kept.encode()[:80].decode(errors='ignore')}~{digest}"


def path_below(root: str | Path, name: str) -> Path:
    """A relative path out of data below a folder: root/name.

    Raises:
        UserError: the name is empty, absolute, leads out of the folder by "..", or no file can have it.
    """
    parts = PurePosixPath(name).parts
    long = any(len(part.encode("utf-8", "surrogatepass")) > LONGEST_NAME for part in parts)
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or long:
        raise UserError(f"{shown(name)}: expected a relative path that stays below {root}")
    return Path(root, *parts)


def _encoded(character: str) -> str:
    """%XX of each of its bytes."""
    if character == ".":
        return "%2E"
    return quote(character, safe="", errors="surrogatepass")


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""One process at a time in a folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from norton_deploy.errors import UserError


@contextmanager
def held(lock: Path, doing: str) -> Iterator[None]:
    """Keep every other process away from a file's folder meanwhile.

    The lock is the operating system's: one whose process died, on whatever host, holds nobody up.

    Args:
        lock: file in that folder; it stays there and names who holds it, or did so last.
        doing: what its holder does there, for the message.

    Raises:
        UserError: another process holds it (the message names it), or the folder cannot be written to.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(f"{lock}: cannot write here ({error.strerror}); choose another --out") from error
    with os.fdopen(descriptor, "r+") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = stream.read().strip() or "another process"
            raise UserError(f"{lock.parent}: {holder} {doing}; wait for it or choose another --out") from error
        except OSError:  # a file system without locks can keep nobody out
            pass
        try:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
        except OSError as error:
            raise UserError(f"{lock}: cannot be written ({error.strerror})") from error
        yield

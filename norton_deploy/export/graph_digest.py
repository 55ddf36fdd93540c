"""The SHA-256 that an exported graph carries of itself: a changed file is refused before it runs, as engines are.

It stands in the file's metadata and is that of the file's bytes with zeros in its own place, so that checking it needs
no ONNX. It finds damage and tools that rewrite graphs; who means to deceive can compute it as well.
"""

import hashlib
from pathlib import Path

from norton_deploy.errors import UserError

DIGEST_KEY = "norton_deploy_sha256"
UNSIGNED = "0" * 64
"""Holds the digest's place until the file's bytes are known."""


def signed(content: bytes) -> bytes:
    """A serialised graph, whose metadata have an entry `DIGEST_KEY`, with its digest in that entry.

    Raises:
        ValueError: there is no such entry.
    """
    place = _place(content)
    if place is None:
        raise ValueError(f"no metadata entry '{DIGEST_KEY}'")
    return b"".join([content[: place.start], _digest(content, place), content[place.stop :]])


def check_digest(path: str | Path) -> None:
    """Compare a file with the digest in it; one that has none was written before there were any.

    Raises:
        UserError: the file was changed.
    """
    content = Path(path).read_bytes()
    place = _place(content)
    if place is not None and content[place] != _digest(content, place):
        raise UserError(f"{path}: its SHA-256 is not the one in its metadata; it was changed, export the model again")


def _place(content: bytes) -> slice | None:
    """Where the digest stands: behind the key, the value's tag and its length, one byte each."""
    key = content.rfind(DIGEST_KEY.encode())
    start = key + len(DIGEST_KEY) + 2
    return None if key < 0 else slice(start, start + len(UNSIGNED))


def _digest(content: bytes, place: slice) -> bytes:
    view, digest = memoryview(content), hashlib.sha256()
    for part in (view[: place.start], UNSIGNED.encode(), view[place.stop :]):
        digest.update(part)
    return digest.hexdigest().encode()

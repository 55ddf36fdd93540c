"""The lock of the development set-up has one version of everything that pyproject.toml names, within its bounds."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
WITHOUT = {"tensorrt"}
"""Extras that the development set-up leaves out."""


def test_the_lock_keeps_the_bounds() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    locked = {
        canonicalize_name(name): version for name, version in re.findall(r"^(\S+)==(\S+)$", "\n".join(lines), re.M)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: needed for name, needed in project["optional-dependencies"].items() if name not in WITHOUT}
    asked = [Requirement(text) for text in sum(extras.values(), project["dependencies"])]
    wrong = {
        str(need): locked.get(canonicalize_name(need.name))
        for need in asked
        if locked.get(canonicalize_name(need.name)) is None
        or locked[canonicalize_name(need.name)] not in need.specifier
    }
    assert not wrong and len(asked) > 30

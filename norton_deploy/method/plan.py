"""What each layer of a model keeps: its CP rank and its number of filters, as readable YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from norton_deploy.config import read_yaml
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write

WHOLE_DETECTOR = "rcnn"
"""Architecture of plans that name a detector's pyramid and heads too."""
_HEADER = """\
# Compression plan. `ranks`: CP rank R of every decomposed convolution (the others stay as they are).
# `keep`: how many filters remain in every pruned group; layers whose channels are added together
# (the residual stream of a stage, the levels of a feature pyramid) are one group.
"""


@dataclass(frozen=True)
class CompressionPlan:
    """Ranks and kept filters of one architecture.

    Attributes:
        architecture: what the names refer to: a classifier or backbone ("resnet50", "vgg16_bn"), whose plan
            also fits the backbone inside a detector, or "rcnn", a whole two-stage detector.
        ranks: convolution name -> CP rank R >= 1 (eq. 2). Layers that are not named are not decomposed.
        keep: channel group name -> number of kept filters O' >= 1 (Algorithm 1). Groups that are not named
            keep all of theirs.
        note: free text: where the plan comes from.
        source: what to call the plan in an error, usually its file.
    """

    architecture: str
    ranks: Mapping[str, int] = field(default_factory=dict)
    keep: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    source: str = field(default="plan", compare=False, repr=False)

    def __post_init__(self) -> None:
        for kind, entries in (("ranks", self.ranks), ("keep", self.keep)):
            for name, value in entries.items():
                if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int):
                    raise UserError(f"{self.source}: {kind}: '{name}': expected a whole number, found {value!r}")
                if value < 1:
                    raise UserError(f"{self.source}: {kind}: layer '{name}': expected at least 1, found {value}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "plan") -> CompressionPlan:
        """Build a plan from its mapping form.

        Raises:
            UserError: unknown or missing keys, or values that are not whole numbers >= 1.
        """
        known = ("architecture", "note", "ranks", "keep")
        for key in values:
            if key not in known:
                raise UserError(f"{source}: unknown key '{key}'; a plan has {', '.join(known)}")
        if not isinstance(values.get("architecture"), str):
            raise UserError(f"{source}: 'architecture' is missing; for example resnet50, vgg16_bn or rcnn")
        sections: dict[str, dict[str, int]] = {}
        for kind in ("ranks", "keep"):
            section = values.get(kind) or {}
            if not isinstance(section, Mapping):
                raise UserError(f"{source}: '{kind}' must map layer names to whole numbers")
            sections[kind] = dict(section)
        return cls(values["architecture"], note=str(values.get("note", "")), source=source, **sections)

    def to_dict(self) -> dict[str, Any]:
        """Mapping form, for YAML and checkpoint headers."""
        return {
            "architecture": self.architecture,
            "note": self.note,
            "ranks": dict(self.ranks),
            "keep": dict(self.keep),
        }

    @classmethod
    def load(cls, path: str | Path) -> CompressionPlan:
        """Read a plan from YAML.

        Raises:
            UserError: the file cannot be read or is not a plan; the message names file and layer.
        """
        return cls.from_dict(read_yaml(path), source=str(path))

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML, whole or not at all."""
        with atomic_write(path, "w") as stream:
            stream.write(_HEADER)
            yaml.safe_dump(self.to_dict(), stream, sort_keys=False, default_flow_style=False)

    def with_prefix(self, architecture: str, prefix: str) -> CompressionPlan:
        """The same plan for a model in which every layer's name starts with `prefix`."""
        ranks = {prefix + name: rank for name, rank in self.ranks.items()}
        keep = {prefix + name: count for name, count in self.keep.items()}
        return replace(self, architecture=architecture, ranks=ranks, keep=keep)

    def within_prefix(self, architecture: str, prefix: str) -> CompressionPlan:
        """The part of the plan below `prefix`, with `prefix` taken off the names."""
        ranks = {name.removeprefix(prefix): rank for name, rank in self.ranks.items() if name.startswith(prefix)}
        keep = {name.removeprefix(prefix): n for name, n in self.keep.items() if name.startswith(prefix)}
        return replace(self, architecture=architecture, ranks=ranks, keep=keep)

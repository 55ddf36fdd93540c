"""What each layer of a model keeps: its CP rank and its number of filters, as readable YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from norton_deploy.config import read_yaml
from norton_deploy.errors import UserError, shown
from norton_deploy.files import atomic_write

FORMS = ("ranks", "coupled", "tucker", "layer_cp")
"""Sections of a plan that decompose layers."""
Choice = Literal["angles", "harm"]
Order = Literal["decompose", "prune"]
SECTIONS = (*FORMS, "keep")
_EXPECTED = {
    "ranks": "a whole number",
    "coupled": "rank and clusters, whole numbers",
    "tucker": "two whole numbers",
    "layer_cp": "a whole number",
    "keep": "a whole number",
}
WHOLE_DETECTOR = "rcnn"
"""Architecture of plans that name a detector's pyramid and heads too."""
LARGEST = 2**20
"""Rank or number of filters."""
_HEADER = """\
# Compression plan. `ranks`: CP rank R of every decomposed convolution (the others stay as they are).
# `keep`: how many filters remain in every pruned group; layers whose channels are added together
# (the residual stream of a stage, the levels of a feature pyramid) are one group.
"""
_SHARED_HEADER = """\
# `coupled`, `tucker`, `layer_cp`: layers whose filters share factors instead: {rank, clusters}, [ranks of the input and
# of the output channels], rank.
"""
_CHOICE_HEADER = "# `choose: harm`: the kept filters are chosen on unlabelled images (compress --refit).\n"
_ORDER_HEADER = "# `first: prune`: the dense layers are pruned, and what is left of them is decomposed.\n"


@dataclass(frozen=True)
class Coupling:
    """How the filters of a layer are coupled: clusters of equal size, in each of which they share `rank` inputs."""

    rank: int
    clusters: int


@dataclass(frozen=True)
class Decomposition:
    """How one layer is decomposed.

    Attributes:
        form: a section of a plan, or "" for a layer that stays as it is.
        numbers: of that section: (R,), for coupled filters (R, clusters), for Tucker-2 (R1, R2).
    """

    form: str = ""
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        name = {"": "dense", "ranks": "rank", "layer_cp": "layer CP"}.get(self.form, self.form)
        return " ".join([name, *map(str, self.numbers)])

    def clipped(self, inputs: int, outputs: int) -> Decomposition:
        """The same with ranks of channels that are not above the layer's, once it is pruned to so many."""
        if self.form == "tucker":
            return Decomposition("tucker", (min(self.numbers[0], inputs), min(self.numbers[1], outputs)))
        if self.form == "coupled":
            return Decomposition("coupled", (min(self.numbers[0], inputs), self.numbers[1]))
        return self


DENSE = Decomposition()


@dataclass(frozen=True)
class CompressionPlan:
    """Ranks and kept filters of one architecture.

    A layer is decomposed in one way at most; layers that are not named are not decomposed.

    Attributes:
        architecture: what the names refer to: a classifier or backbone ("resnet50", "vgg16_bn"), whose plan
            also fits the backbone inside a detector, or "rcnn", a whole two-stage detector.
        ranks: convolution name -> CP rank R >= 1 of each of its filters (eq. 2), the paper's form.
        keep: channel group name -> number of kept filters O' >= 1 (Algorithm 1). Groups that are not named
            keep all of theirs.
        note: free text: where the plan comes from.
        source: what to call the plan in an error, usually its file.
        coupled: convolution name -> clusters and rank (`decompose_coupled`).
        tucker: convolution name -> ranks (R1, R2) of the input and of the output channels, Tucker-2.
        layer_cp: convolution name -> CP rank of the whole layer, its Kh x Kw kernel positions as one mode.
        choose: which filters are kept: by the "angles" between their factors, as in the paper (eq. 11, Algorithm 1), or
            those whose loss does least "harm" to the next layers on unlabelled images (`choose_by_harm`).
        first: what comes first. "decompose", as in the paper: factors of the dense layers are cut. "prune": the filters
            are chosen in the same way, and what is left of the dense layers is decomposed.
    """

    architecture: str
    ranks: Mapping[str, int] = field(default_factory=dict)
    keep: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    source: str = field(default="plan", compare=False, repr=False)
    coupled: Mapping[str, Coupling] = field(default_factory=dict)
    tucker: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    layer_cp: Mapping[str, int] = field(default_factory=dict)
    choose: Choice = "angles"
    first: Order = "decompose"

    def __post_init__(self) -> None:
        for key, known in (("choose", get_args(Choice)), ("first", get_args(Order))):
            if getattr(self, key) not in known:
                found = shown(getattr(self, key))
                raise UserError(f"{self.source}: {key}: expected {' or '.join(known)}, found {found}")
        for kind in SECTIONS:
            for name, value in getattr(self, kind).items():
                for number in _numbers(value):
                    where = f"{self.source}: {kind}: layer {shown(name)}"
                    if not isinstance(name, str) or isinstance(number, bool) or not isinstance(number, int):
                        raise UserError(f"{where}: expected {_EXPECTED[kind]}, found {shown(value)}")
                    if not 1 <= number <= LARGEST:
                        raise UserError(f"{where}: expected at least 1 and at most {LARGEST}, found {shown(number)}")
        forms: dict[str, str] = {}
        for kind in FORMS:
            for name in getattr(self, kind):
                if forms.setdefault(name, kind) != kind:
                    raise UserError(f"{self.source}: layer '{name}' is in both '{forms[name]}' and '{kind}'")

    @property
    def decomposed(self) -> tuple[str, ...]:
        """Names of all decomposed layers."""
        return tuple(name for kind in FORMS for name in getattr(self, kind))

    def decomposition(self, layer: str) -> Decomposition:
        """How a layer is decomposed."""
        for form in FORMS:
            if layer in getattr(self, form):
                return Decomposition(form, _numbers(getattr(self, form)[layer]))
        return DENSE

    def with_decompositions(self, layers: Mapping[str, Decomposition]) -> CompressionPlan:
        """The same plan with these layers decomposed, and no others."""
        sections: dict[str, Any] = {form: {} for form in FORMS}
        for name, found in layers.items():
            if found.form == "coupled":
                sections["coupled"][name] = Coupling(*found.numbers)
            elif found.form:
                sections[found.form][name] = found.numbers if found.form == "tucker" else found.numbers[0]
        return replace(self, **sections)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "plan") -> CompressionPlan:
        """Build a plan from its mapping form.

        Raises:
            UserError: unknown or missing keys, or values that are not whole numbers >= 1.
        """
        known = ("architecture", "note", "choose", "first", *SECTIONS)
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: expected a plan with {', '.join(known)}, found {shown(values)}")
        for key in values:
            if key not in known:
                raise UserError(f"{source}: unknown key {shown(key)}; a plan has {', '.join(known)}")
        if not isinstance(values.get("architecture"), str):
            raise UserError(f"{source}: 'architecture' is missing; for example resnet50, vgg16_bn or rcnn")
        sections: dict[str, dict[str, Any]] = {}
        for kind in SECTIONS:
            section = values.get(kind) or {}
            if not isinstance(section, Mapping):
                raise UserError(f"{source}: '{kind}' must map layer names to {_EXPECTED[kind]}")
            read = {"coupled": _read_coupling, "tucker": _read_pair}.get(kind, _as_it_is)
            try:
                sections[kind] = {name: read(value) for name, value in section.items()}
            except (TypeError, ValueError) as error:
                raise UserError(f"{source}: {kind}: expected {_EXPECTED[kind]} for each layer; {error}") from None
        note = values.get("note", "")
        return cls(
            values["architecture"],
            note=note if isinstance(note, str) else shown(note),
            source=source,
            choose=values.get("choose", "angles"),
            first=values.get("first", "decompose"),
            **sections,
        )

    def to_dict(self) -> dict[str, Any]:
        """Mapping form, for YAML and checkpoint headers; of the shared forms, those that the plan uses."""
        shared = {
            "coupled": {name: asdict(coupling) for name, coupling in self.coupled.items()},
            "tucker": {name: list(pair) for name, pair in self.tucker.items()},
            "layer_cp": dict(self.layer_cp),
        }
        return {
            "architecture": self.architecture,
            "note": self.note,
            **({"choose": self.choose} if self.choose != "angles" else {}),
            **({"first": self.first} if self.first != "decompose" else {}),
            "ranks": dict(self.ranks),
            **{kind: section for kind, section in shared.items() if section},
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
            stream.write(_HEADER + (_SHARED_HEADER if self.coupled or self.tucker or self.layer_cp else ""))
            stream.write(_CHOICE_HEADER if self.choose == "harm" else "")
            stream.write(_ORDER_HEADER if self.first == "prune" else "")
            yaml.safe_dump(self.to_dict(), stream, sort_keys=False, default_flow_style=False)

    def with_prefix(self, architecture: str, prefix: str) -> CompressionPlan:
        """The same plan for a model in which every layer's name starts with `prefix`."""
        return self.renamed(lambda name: prefix + name, architecture)

    def within_prefix(self, architecture: str, prefix: str) -> CompressionPlan:
        """The part of the plan below `prefix`, with `prefix` taken off the names."""
        return self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None, architecture)

    def renamed(self, rename: Callable[[str], str | None], architecture: str | None = None) -> CompressionPlan:
        """The same plan under other names of its layers and groups, without those whose new name is None."""
        sections: dict[str, Any] = {
            kind: {new: value for name, value in getattr(self, kind).items() if (new := rename(name)) is not None}
            for kind in SECTIONS
        }
        return replace(self, architecture=architecture or self.architecture, **sections)


def _numbers(value: Any) -> tuple[Any, ...]:
    """The numbers of an entry."""
    if isinstance(value, Coupling):
        return value.rank, value.clusters
    return value if isinstance(value, tuple) else (value,)


def _read_coupling(value: Any) -> Coupling:
    return Coupling(**value)


def _read_pair(value: Any) -> tuple[int, int]:
    first, second = value
    return first, second


def _as_it_is(value: Any) -> Any:
    return value

"""Typed settings: a dataclass filled from a YAML file and the command line; an unknown key is an error."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import tyro
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from norton_deploy.errors import UserError, shown
from norton_deploy.files import check_tree, read_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")
FINITE = ConfigDict(allow_inf_nan=False)


class _StrictLoader(yaml.SafeLoader):
    """Plain values only; a key that stands twice in a mapping is an error, of which PyYAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
            if name in seen:
                problem = f"{shown(key.value)} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty one.

    Raises:
        UserError: the file is missing, is not YAML or not a mapping, has a key twice, or grows too large through its
            aliases.
    """
    text = read_text(path, "a YAML file of settings")
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: impossible dates, endless integers
        reason = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise UserError(f"{path}: not valid YAML: {reason}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    check_tree(content, str(path))
    return content


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _checked_fields(settings_class: type[Any], values: dict[str, Any], source: str) -> dict[str, Any]:
    """The given fields, each converted to its declared type; fields that are not given stay out."""
    hints = get_type_hints(settings_class)
    known = [field.name for field in fields(settings_class) if field.init]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{source}: unknown key {shown(key)}; known keys: {', '.join(known)}")
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
            checked[name] = from_mapping(hint, value, f"{source}: {name}")
            continue
        try:
            checked[name] = TypeAdapter(hint, config=None if is_dataclass(hint) else FINITE).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([name, *(str(part) for part in first["loc"])])
            raise UserError(f"{source}: field '{where}': {first['msg']} (got {shown(first['input'])})") from error
    return checked


def from_mapping(settings_class: type[S], values: Any, source: str) -> S:
    """Build a dataclass from a mapping, checking every type; keys may use '-' or '_'.

    Args:
        settings_class: a dataclass, its fields may be dataclasses too.
        values: field name -> value, as a file has it: it may be anything.
        source: what to name in an error, usually the file.

    Raises:
        UserError: no mapping, an unknown key, a missing field, or a value of the wrong type or one that is not finite,
            named with `source`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping of fields, found {type(values).__name__}")
    checked = _checked_fields(settings_class, values, source)
    for field in fields(settings_class):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in checked:
            raise UserError(f"{source}: the field '{field.name}' is missing")
    try:
        return settings_class(**checked)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def parse_settings(settings_class: type[S], argv: Sequence[str] | None = None, *, prog: str, description: str) -> S:
    """Fill `settings_class` from `--config FILE.yaml`, then from the command line, which wins.

    `--help` and command-line mistakes exit as argparse does (status 0 and 2).

    Raises:
        UserError: the configuration file is wrong (unknown key, wrong type, missing file).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    description += " Settings may also stand in a YAML file: --config FILE; the command line wins."
    config_file: str | None = None
    for position, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.partition("=")[2]
            if not inline and position + 1 >= len(arguments):
                raise UserError("--config: expected a YAML file after it")
            config_file = inline or arguments[position + 1]
            del arguments[position : position + (1 if inline else 2)]
            break
    if config_file is None:
        return tyro.cli(settings_class, args=arguments, prog=prog, description=description)
    values = _checked_fields(settings_class, read_yaml(config_file), config_file)
    for field in fields(settings_class):
        if field.default is MISSING and field.default_factory is MISSING:
            values.setdefault(field.name, tyro.MISSING)
    default = _unchecked(settings_class, values)  # the class checks its fields when the command line has been heard
    return tyro.cli(settings_class, args=arguments, default=default, prog=prog, description=description)


def _unchecked(settings_class: type[S], values: dict[str, Any]) -> S:
    """An object with these fields and the defaults of the others, without the class's own checks."""
    settings = object.__new__(settings_class)
    for field in fields(settings_class):
        if field.name in values:
            value = values[field.name]
        else:
            value = field.default if field.default_factory is MISSING else field.default_factory()
        object.__setattr__(settings, field.name, value)
    return settings

"""Typed settings: a dataclass filled from a YAML file and the command line; an unknown key is an error."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from norton_deploy.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
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
            raise UserError(f"{source}: unknown key '{key}'; known keys: {', '.join(known)}")
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
            checked[name] = from_mapping(hint, value, f"{source}: {name}")
            continue
        try:
            checked[name] = TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([name, *(str(part) for part in first["loc"])])
            raise UserError(f"{source}: field '{where}': {first['msg']} (got {first['input']!r})") from error
    return checked


def from_mapping(settings_class: type[S], values: dict[str, Any], source: str) -> S:
    """Build a dataclass from a mapping, checking every type; keys may use '-' or '_'.

    Args:
        settings_class: a dataclass, its fields may be dataclasses too.
        values: field name -> value.
        source: what to name in an error, usually the file.

    Raises:
        UserError: an unknown key, a missing field or a value of the wrong type, named with `source`.
    """
    checked = _checked_fields(settings_class, values, source)
    for field in fields(settings_class):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in checked:
            raise UserError(f"{source}: the field '{field.name}' is missing")
    return settings_class(**checked)


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

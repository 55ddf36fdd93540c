"""What `--help` prints, read from the source of a command without importing it: torch alone takes seconds to import.

A command's options are the fields of its dataclass `Settings`, of the classes that it inherits from and of the
dataclasses inside it; each has its help as the string below it. `tests/test_help.py` compares them with the options
that are parsed.
"""

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

WIDTH = 110
INDENT = 6
FIRST = "FIRST"
"""Name of a tuple in a command's module: the options that matter most, in their order."""
SUPPRESSED = "suppressed"


@dataclass(frozen=True)
class Option:
    """Attributes: its name without dashes, the values it takes, its default (None: it must be given), its help, and the
    words over its group."""

    name: str
    values: str
    default: str | None
    text: str
    group: str


class Source:
    """The parsed source of a module of this package."""

    def __init__(self, module: str) -> None:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        self.tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        self.imports = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def find(self, name: str) -> "tuple[Source, ast.ClassDef | ast.expr] | None":
        """A class, or the value of a constant, that this module defines or imports from this package."""
        module, _, rest = name.partition(".")
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return self, node
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id == name and value is not None:
                return self, value
        if module in self.imports and self.imports[module][0].startswith("norton_deploy"):
            home, original = self.imports[module]
            return Source(f"{home}.{original}").find(rest) if rest else Source(home).find(original)
        return None

    def find_class(self, name: str) -> "tuple[Source, ast.ClassDef] | None":
        """As `find`; None for a constant."""
        found = self.find(name)
        return (found[0], found[1]) if found is not None and isinstance(found[1], ast.ClassDef) else None

    def find_value(self, name: str) -> "tuple[Source, ast.expr] | None":
        """As `find`; None for a class."""
        found = self.find(name)
        return (found[0], found[1]) if found is not None and isinstance(found[1], ast.expr) else None


def options_of(command: str) -> list[Option]:
    """The options of a command, in the order of its classes."""
    source = Source(f"norton_deploy.commands.{command}")
    found = {option.name: option for option in _fields(source, "Settings", "", "Options")}
    return [option for option in found.values() if option.group != SUPPRESSED]


def first_sentence(command: str) -> str:
    """What a command does, in a line."""
    text = ast.get_docstring(Source(f"norton_deploy.commands.{command}").tree) or ""
    return text.splitlines()[0] if text else ""


def help_text(command: str) -> str:
    """Usage, description and options: first those that must be given, then those that matter most, then the others."""
    source = Source(f"norton_deploy.commands.{command}")
    options, first = options_of(command), source.find_value(FIRST)
    names = ast.literal_eval(first[1]) if first is not None else ()
    by_name = {option.name: option for option in options}
    needed = [option for option in options if option.default is None]
    common = [by_name[name] for name in names if by_name[name] not in needed]
    groups: dict[str, list[Option]] = {"Needed": needed, "Most used": common, "Options": []}
    for option in options:
        if option not in needed and option not in common:
            groups.setdefault(option.group, []).append(option)
    usage = "".join(f" --{option.name} {option.values}" for option in needed)
    lines = [f"usage: norton {command}{usage} [options]", ""]
    description = ast.get_docstring(source.tree) or ""
    lines.append(description)
    if "config" not in by_name:
        lines += ["", "Settings may also stand in a YAML file: --config FILE.yaml; the command line wins."]
    for group, members in groups.items():
        if members:
            lines += ["", f"{group}:", *(line for option in members for line in _lines(option))]
    return "\n".join(lines)


def _lines(option: Option) -> Iterator[str]:
    yield f"  --{option.name} {option.values}".rstrip()
    default = "" if option.default in (None, "None", "False", "()") else f" (default: {option.default})"
    for line in textwrap.wrap(option.text + default, WIDTH, break_on_hyphens=False):
        yield " " * INDENT + line


def _fields(source: Source, name: str, prefix: str, group: str) -> Iterator[Option]:
    """Of a dataclass and its bases; a later one of the same name replaces an earlier one."""
    found = source.find_class(name)
    if found is None:
        return
    home, definition = found
    for base in definition.bases:
        parent = ast.unparse(base)
        yield from _fields(home, parent, prefix, group if prefix else _heading(home, parent))
    body = definition.body
    for node, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        option = f"{prefix}{node.target.id.replace('_', '-')}"
        annotation = ast.unparse(node.annotation)
        if annotation.startswith("Suppress"):
            yield Option(option, "", "", "", SUPPRESSED)
            continue
        if home.find_class(annotation) is not None:
            yield from _fields(home, annotation, f"{option}.", f"{str(text).rstrip('.')} (--{option}.*)")
            continue
        default = None if node.value is None else _default(home, node.value)
        values = _values(home, node.annotation)
        if annotation == "bool":
            values = f"| --{prefix}no-{option.removeprefix(prefix)}"
        yield Option(option, values, default, " ".join(str(text).split()), group)


def _heading(source: Source, name: str) -> str:
    """Over the options of a class that others inherit from: the first line of its docstring."""
    found = source.find_class(name)
    text = None if found is None else ast.get_docstring(found[1])
    return (text or "Options").splitlines()[0].rstrip(".")


def _default(source: Source, value: ast.expr) -> str:
    """How a default is typed on the command line."""
    if isinstance(value, ast.Name | ast.Attribute):
        found = source.find_value(ast.unparse(value))
        if found is not None:
            return _default(*found)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div):
        return f"{_default(source, value.left)}/{_default(source, value.right)}"
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Path":
        return _default(source, value.args[0])
    if isinstance(value, ast.Tuple) and value.elts:
        return " ".join(_default(source, element) for element in value.elts)
    if isinstance(value, ast.Constant):
        return str(value.value)
    return ast.unparse(value)


def _values(source: Source, annotation: ast.expr) -> str:
    """What may stand behind an option, as {a,b}, INT, PATH, INT INT or [PATH ...]."""
    if isinstance(annotation, ast.BinOp):
        kinds = [_values(source, side) for side in (annotation.left, annotation.right)]
        return "|".join(kind for kind in kinds if kind != "NONE")
    if isinstance(annotation, ast.Subscript):
        kind = ast.unparse(annotation.value)
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if kind == "Literal":
            return "{" + ",".join(_choices(source, inner)) + "}"
        if kind == "tuple" and isinstance(inner[-1], ast.Constant):
            return f"[{_values(source, inner[0])} ...]"
        if kind == "tuple":
            return " ".join(_values(source, element) for element in inner)
    if isinstance(annotation, ast.Name):
        found = source.find_value(annotation.id)
        if found is not None:
            return _values(*found)
    return ast.unparse(annotation).upper()


def _choices(source: Source, elements: list[ast.expr]) -> Iterator[str]:
    """The values of a Literal; one inside another is opened."""
    for element in elements:
        if isinstance(element, ast.Constant):
            yield str(element.value)
            continue
        found = source.find_value(ast.unparse(element))
        if found is not None and isinstance(found[1], ast.Subscript):
            inner = found[1].slice
            yield from _choices(found[0], inner.elts if isinstance(inner, ast.Tuple) else [inner])

"""The categories of one's own model, from an annotation file or a plain list."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Never

from norton_deploy.data.coco_entries import check_categories
from norton_deploy.errors import UserError
from norton_deploy.files import parse_json, read_text
from norton_deploy.structures import Categories


def read_categories(path: str | Path) -> list[dict[str, Any]]:
    """Category entries {"id", "name"}, ascending by id.

    Args:
        path: a COCO annotation file (.json), or a text with one name a line, which get the ids 1, 2, ...

    Raises:
        UserError: the file cannot be read, or has no categories.
    """
    text = read_text(path, "a COCO annotation file or a list of names")
    if Path(path).suffix != ".json":
        names = [line.strip() for line in text.splitlines() if line.strip()]
        return [{"id": number, "name": name} for number, name in enumerate(names, start=1)] or _none(path)
    content = parse_json(text, str(path))
    listed = content.get("categories") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise UserError(f"{path}: not a COCO annotation file: the list 'categories' is missing")
    check_categories(listed, path)
    entries = [{"id": entry["id"], "name": entry["name"]} for entry in listed] or _none(path)
    return sorted(entries, key=lambda entry: int(entry["id"]))


def _none(path: str | Path) -> Never:
    raise UserError(f"{path}: names no category")


def categories_of_model(path: str | Path, num_classes: int, source: str) -> Categories:
    """The categories in a file as the labels of a model that was trained on them elsewhere.

    Labels are 1..K in the order of the ids, as torchvision's tutorials have it; the ids themselves where the model
    has as many classes as the largest id asks for (COCO's 91).

    Args:
        source: what to call the model in an error.

    Raises:
        UserError: the model has another number of classes.
    """
    entries = read_categories(path)
    found = Categories.from_coco(entries)
    if found.num_classes != num_classes and found.ids[-1] + 1 == num_classes and found.ids[0] > 0:
        found = Categories(found.ids, found.ids, found.names)
    if found.num_classes != num_classes:
        raise UserError(
            f"{path}: names {len(entries)} categories, which is {len(entries) + 1} classes with the background, but "
            f"{source} has {num_classes}; give those that the model was trained on (--categories)"
        )
    return found


def names_no_categories(model: str | Path) -> bool:
    """Whether a model file is a bare state_dict (.pth, .pt), which knows no names."""
    return Path(model).suffix in (".pth", ".pt")


def lists_of_files(models: Iterable[Path], categories: Path | None) -> dict[Path, Path]:
    """Model file -> the list of its categories, for those that name none.

    Args:
        models: files that are shown side by side.
        categories: the user's list, if there is one.

    Raises:
        UserError: there is one, and every file has its own names.
    """
    if categories is None:
        return {}
    files = list(models)
    if not (found := {file: categories for file in files if names_no_categories(file)}):
        own = "has its own" if len(files) == 1 else "have their own"
        raise UserError(f"{', '.join(map(str, files))}: {own} categories; leave --categories out")
    return found

"""The categories of one's own model, from an annotation file or a plain list."""

import json
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError
from norton_deploy.structures import Categories


def read_categories(path: str | Path) -> list[dict[str, Any]]:
    """Category entries {"id", "name"}, ascending by id.

    Args:
        path: a COCO annotation file (.json), or a text with one name a line, which get the ids 1, 2, ...

    Raises:
        UserError: the file cannot be read, or has no categories.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: neither a COCO annotation file nor a list of names ({error})") from error
    if Path(path).suffix != ".json":
        names = [line.strip() for line in text.splitlines() if line.strip()]
        entries = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    else:
        try:
            listed = json.loads(text)["categories"]
            entries = [{"id": int(entry["id"]), "name": str(entry["name"])} for entry in listed]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a COCO annotation file with 'categories' ({error!r})") from error
    if not entries:
        raise UserError(f"{path}: names no category")
    return sorted(entries, key=lambda entry: int(entry["id"]))


def categories_of_model(path: str | Path, num_classes: int, source: str) -> Categories:
    """The categories in a file as the labels of a model that was trained on them elsewhere.

    Labels are 1..K in the order of the ids, as torchvision's tutorials have it; the ids themselves where the model
    has as many classes as the largest id asks for (COCO's 91).

    Args:
        path: see `read_categories`.
        num_classes: of the model, background included.
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
            f"{source} has {num_classes}; give the file that the model was trained on"
        )
    return found

"""For mkdocs: files outside docs/ that its pages link to go into the site too, under the same paths."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#:\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Take in what is linked to; a page that comes in this way is searched for links too."""
    pages = [(file.src_uri, file.content_string) for file in files if file.src_uri.endswith(".md")]
    while pages:
        uri, text = pages.pop()
        for _, link in LINK.findall(text):
            target = _in_site(uri, link)
            if target is None or files.get_file_from_path(target) or not (ROOT / target).is_file():
                continue
            file = File(target, str(ROOT), config["site_dir"], False)
            files.append(file)
            if target.endswith(".md"):
                pages.append((target, (ROOT / target).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of docs/ that lead out of it, as links inside the site."""
    uri = page.file.src_uri

    def inside(match: re.Match[str]) -> str:
        target = _in_site(uri, match[2])
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(inside, markdown)


def _in_site(uri: str, link: str) -> str | None:
    """Path in the site of what a page links to over the border of docs/; None for the links that hold already."""
    if (ROOT / uri).is_file():  # a page that was taken in: in the site docs/ is the root
        target = posixpath.normpath(posixpath.join(posixpath.dirname(uri), link))
        return target.removeprefix("docs/")
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), link))
    return None if target.startswith("docs/") else target

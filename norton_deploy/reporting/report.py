"""Reports: blocks in order that come out as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from norton_deploy.errors import UserError

PICTURE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
STYLE = Path(__file__).with_name("report.css")
OPTION = re.compile(r"(?<![\w-])--[\w-]+")
NUMBER = re.compile(r"[-+−±]?[\d.,]+\b.{0,16}|[-–]?")
SECTIONS_OF_A_LONG_PAGE = 4


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str

    def to_markdown(self, _folder: Path) -> str:
        """Of the second level."""
        return f"## {_one_line(self.text)}"

    def to_html(self) -> str:
        """Of the second level, with the id that the page's contents link to."""
        return f'<h2 id="{_anchor(self.text)}">{html.escape(self.text)}</h2>'


@dataclass(frozen=True)
class Paragraph:
    """Plain text. The "lead" says what a report found, a "note" what to know before believing it."""

    text: str
    kind: Literal["plain", "lead", "note"] = "plain"

    def to_markdown(self, _folder: Path) -> str:
        """The text; the lead is bold, a note quoted."""
        before, after = {"plain": ("", ""), "lead": ("**", "**"), "note": ("> ", "")}[self.kind]
        return before + self.text.replace("<", "&lt;") + after

    def to_html(self) -> str:
        """One <p>."""
        kind = "" if self.kind == "plain" else f' class="{self.kind}"'
        text = OPTION.sub(r"<span>\g<0></span>", html.escape(self.text))
        return f"<p{kind}>{text}</p>"


@dataclass(frozen=True)
class Command:
    """What was run, and what for."""

    title: str
    command: str

    def to_markdown(self, _folder: Path) -> str:
        """An indented block."""
        return f"{_one_line(self.title)}:\n\n    {' '.join(self.command.splitlines())}"

    def to_html(self) -> str:
        """The title and a <pre>, whose lines break between words only."""
        words = " ".join(f"<span>{html.escape(word)}</span>" for word in self.command.split())
        return f'<div class="command"><p>{html.escape(self.title)}</p><pre><code>{words}</code></pre></div>'


@dataclass(frozen=True)
class Figures:
    """The figures to see first.

    Attributes:
        entries: (value, what it is, what to compare it with).
    """

    entries: tuple[tuple[str, str, str], ...]

    def to_markdown(self, _folder: Path) -> str:
        """A list."""
        return "\n".join(f"- **{value}** {name}: {note}" for value, name, note in self.entries)

    def to_html(self) -> str:
        """Tiles."""
        tiles = "".join(
            f"<div><dt>{html.escape(name)}</dt><dd><b>{html.escape(value)}</b>{html.escape(note)}</dd></div>"
            for value, name, note in self.entries
        )
        return f'<dl class="figures">{tiles}</dl>'


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first cell of a row is its title.

    Attributes:
        header: column titles.
        rows: cells, as many per row as titles.
        caption: one line above the table, "" for none.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"table '{self.caption}': {len(self.header)} columns, but a row has {len(row)}")

    def to_markdown(self, _folder: Path | None = None) -> str:
        """GitHub's pipe table."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        text = "\n".join(
            "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        return f"{_one_line(self.caption)}\n\n{text}" if self.caption else text

    def to_html(self) -> str:
        """A table that scrolls by itself where it is too wide; columns of numbers stand at the right."""
        right = [all(NUMBER.fullmatch(row[column]) for row in self.rows) for column in range(len(self.header))]

        def cells(row: tuple[str, ...], tag: str = "td") -> str:
            parts = []
            for column, cell in enumerate(row):
                kind = "th" if column == 0 else tag
                scope = "" if kind == "td" else ' scope="col"' if tag == "th" else ' scope="row"'
                number = ' class="number"' if right[column] else ""
                parts.append(f"<{kind}{scope}{number}>{html.escape(cell)}</{kind}>")
            return f"<tr>{''.join(parts)}</tr>"

        caption = f'<p class="caption">{html.escape(self.caption)}</p>' if self.caption else ""
        label = html.escape(self.caption or ", ".join(filter(None, self.header)))
        body = "\n".join(cells(row) for row in self.rows)
        return (
            f'<div class="table">{caption}<div role="region" tabindex="0" aria-label="{label}">'
            f'<table aria-label="{label}">\n<thead>{cells(self.header, "th")}</thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div></div>"
        )


@dataclass(frozen=True)
class Picture:
    """An image file (.png, .jpg or .svg, the latter trusted) with the text that stands for it."""

    path: Path
    text: str

    def to_markdown(self, folder: Path) -> str:
        """A link relative to `folder`."""
        text = _one_line(self.text).replace("]", "\\]")
        return f"![{text}]({Path(os.path.relpath(self.path, folder)).as_posix()})"

    def to_html(self) -> str:
        """A figure with the whole picture in it.

        Raises:
            UserError: it is missing or of another kind.
        """
        text, suffix = html.escape(self.text), self.path.suffix.lower()
        if suffix not in (*PICTURE_TYPES, ".svg") or not self.path.is_file():
            raise UserError(f"{self.path}: no such .png, .jpg or .svg picture for the report")
        if suffix == ".svg":
            image = _inline_svg(self.path, text)
        else:
            encoded = base64.b64encode(self.path.read_bytes()).decode("ascii")
            image = f'<img src="data:{PICTURE_TYPES[suffix]};base64,{encoded}" alt="{text}">'
        return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, below each other where there is no room, with a line above them."""

    pictures: tuple[Picture, ...]
    text: str = ""

    def to_markdown(self, folder: Path) -> str:
        """The pictures in one line."""
        pictures = " ".join(picture.to_markdown(folder) for picture in self.pictures)
        return f"{_one_line(self.text)}\n\n{pictures}" if self.text else pictures

    def to_html(self) -> str:
        """A grid of as many columns as pictures at most."""
        text = f"<p>{html.escape(self.text)}</p>" if self.text else ""
        pictures = "".join(picture.to_html() for picture in self.pictures)
        return f'<div class="gallery">{text}<div class="columns-{len(self.pictures)}">{pictures}</div></div>'


Block = Heading | Paragraph | Command | Figures | Table | Picture | Gallery


@dataclass
class Report:
    """A title and blocks, in order."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def to_markdown(self, folder: Path) -> str:
        """Markdown; pictures are linked relative to `folder`, where the text will be stored."""
        parts = [f"# {_one_line(self.title)}", *(block.to_markdown(folder) for block in self.blocks)]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """One HTML page with everything inside, for screens of any width and for paper.

        Raises:
            UserError: a picture is missing or of another kind.
        """
        title = html.escape(self.title)
        first = next((place for place, block in enumerate(self.blocks) if isinstance(block, Heading)), len(self.blocks))
        above, below = (_lines(blocks) for blocks in (self.blocks[:first], self.blocks[first:]))
        headings = [block.text for block in self.blocks if isinstance(block, Heading)]
        contents = ""
        if len(headings) >= SECTIONS_OF_A_LONG_PAGE:
            links = "".join(f'<li><a href="#{_anchor(text)}">{html.escape(text)}</a></li>' for text in headings)
            contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
            f"{above}\n{contents}{below}\n</main>\n</body>\n</html>\n"
        )


def _lines(blocks: Iterable[Block]) -> str:
    return "\n".join(block.to_html() for block in blocks)


def _one_line(text: str) -> str:
    """Markdown of plain text that has to stay in its line."""
    return " ".join(text.split("\n")).replace("<", "&lt;")


def _anchor(heading: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", heading.lower())) or "section"


def _inline_svg(path: Path, text: str) -> str:
    """The drawing with ids of its own, without the header of a file."""
    drawing = path.read_text(encoding="utf-8")
    drawing = drawing[drawing.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{text}" ', 1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{path.stem}-", drawing)

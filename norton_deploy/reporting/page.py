"""Reports that are written once and come out as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import os
from dataclasses import dataclass, field
from pathlib import Path

from norton_deploy.errors import UserError
from norton_deploy.reporting.tables import Table

PICTURE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92rem; }
caption { caption-side: top; text-align: left; font-weight: 600; padding-bottom: 0.3rem; }
th, td { border: 1px solid #ccc; padding: 0.3rem 0.6rem; text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th { background: #f2f2f2; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An image file (.png or .jpg) with the text that stands for it."""

    path: Path
    text: str


Block = Heading | Paragraph | Picture | Table


@dataclass
class Report:
    """A title and blocks, in order."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def to_markdown(self, folder: Path) -> str:
        """Markdown; pictures are linked relative to `folder`, where the text will be stored."""
        parts = [f"# {self.title}"]
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"## {block.text}")
            elif isinstance(block, Paragraph):
                parts.append(block.text)
            elif isinstance(block, Picture):
                target = Path(os.path.relpath(block.path, folder)).as_posix()
                parts.append(f"![{block.text}]({target})")
            else:
                parts.append(block.to_markdown())
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """One HTML page with everything inside, pictures too.

        Raises:
            UserError: a picture is missing or of another kind.
        """
        body = "\n".join(_block_html(block) for block in self.blocks)
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )


def _block_html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Picture):
        kind = PICTURE_TYPES.get(block.path.suffix.lower())
        if kind is None or not block.path.is_file():
            raise UserError(f"{block.path}: no such .png or .jpg picture for the report")
        encoded = base64.b64encode(block.path.read_bytes()).decode("ascii")
        text = html.escape(block.text)
        return f'<figure><img src="data:{kind};base64,{encoded}" alt="{text}"><figcaption>{text}</figcaption></figure>'
    caption = f"<caption>{html.escape(block.caption)}</caption>" if block.caption else ""
    header = "".join(f"<th>{html.escape(title)}</th>" for title in block.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    return f"<table>{caption}\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"

"""One self-contained HTML file: inline style, images as data, no script, no network.

Everything that comes from outside (prompts, names, values) passes through the autoescaping template; the page's
content policy forbids scripts and remote content besides.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pysteer.errors import InputError


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str
    kind: str = "paragraph"


@dataclass(frozen=True)
class Facts:
    """Headline figures: (label, value, note) each."""

    items: Sequence[tuple[str, str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first column heads its row, the others are aligned as numbers when `numeric`.

    `strong` holds the indices of rows to stress.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()
    numeric: bool = True
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """An image with its text for readers who do not see it; `dark` is shown in a dark colour scheme."""

    light: bytes
    alt: str
    caption: str = ""
    dark: bytes | None = None
    kind: str = "figure"

    @property
    def width(self) -> int | None:
        """Width in CSS pixels at which a drawn figure has words as large as those of the page; None for others."""
        drawn = getattr(self.light, "figure", None)
        return None if drawn is None else round(96 * drawn.get_figwidth())

    @property
    def light_data(self) -> str:
        return _data(self.light)

    @property
    def dark_data(self) -> str | None:
        return None if self.dark is None else _data(self.dark)


@dataclass(frozen=True)
class Details:
    """Blocks that open on demand."""

    summary: str
    blocks: Sequence[Paragraph | Facts | Table | Figure]
    kind: str = "details"


Block = Paragraph | Facts | Table | Figure | Details


@dataclass(frozen=True)
class Section:
    """A headed part of the page; `anchor` is its id in the address (letters, digits and dashes)."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """The whole page. `lead` is the answer in one or two sentences; `footer` says how the page was made."""

    title: str
    lead: str
    sections: Sequence[Section]
    footer: str = ""


def _data(png: bytes) -> str:
    if not png.startswith(b"\x89PNG"):
        raise InputError("figure", value=png[:8], allowed="PNG bytes", fix="encode the image as PNG")
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _check(report: Report) -> None:
    anchors = [section.anchor for section in report.sections]
    for anchor in anchors:
        if not anchor.replace("-", "").isalnum() or anchors.count(anchor) > 1:
            raise InputError(
                "section anchor", value=anchor, allowed="letters, digits and dashes, each once", fix="rename it"
            )
    for section in report.sections:
        for block in section.blocks:
            for inner in block.blocks if isinstance(block, Details) else [block]:
                if isinstance(inner, Figure) and not inner.alt.strip():
                    raise InputError("alt text of a figure", value=inner.alt, allowed="a sentence", fix="describe it")
                if isinstance(inner, Table) and any(len(row) != len(inner.columns) for row in inner.rows):
                    raise InputError(
                        f"row of table {inner.caption!r}",
                        value=[len(row) for row in inner.rows],
                        allowed=f"{len(inner.columns)} cells",
                        fix="give every row a cell per column",
                    )


def render(report: Report) -> str:
    """The page as one HTML string. Raises `InputError` for a figure without alt text or a ragged table."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    _check(report)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(report=report)

"""Pages of headings, texts, tables and plots: HTML that loads nothing, and the same as Markdown."""

from __future__ import annotations

import dataclasses
import html
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from ctc_spec_jax.errors import InputError

# Pictures keep their size where the page is narrow, and scroll: their texts would become too small.
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em;
  overflow-wrap: break-word; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8888; padding: 0.25em 0.5em; text-align: right; }
th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
th, td { white-space: nowrap; } table.text td:last-child { white-space: normal; }
figure, .table { margin: 1em 0; overflow-x: auto; }
svg { background: white; display: block; min-width: 40em; width: 100%; max-width: 52em;
  height: auto; }
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of a report: a heading, then a text, a table with its header first, a picture."""

    heading: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    svg: str = ""


def as_html(found: Sequence[Block]) -> str:
    """One page; it loads nothing."""
    parts = ['<!doctype html>\n<html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>{html.escape(found[0].heading)}</title><style>{_STYLE}</style></head>")
    parts.append("<body>")
    for index, block in enumerate(found):
        level = 2 if index else 1
        parts.append(f"<h{level}>{html.escape(block.heading)}</h{level}>")
        if block.text:
            parts.append(f"<p>{html.escape(block.text)}</p>")
        if block.svg:
            parts.append(f'<figure tabindex="0">{_named(block)}</figure>')
        if block.table:
            kind = ' class="text"' if len(block.table[0]) == 2 else ""
            parts.append(f'<div class="table" tabindex="0"><table{kind}>')
        for number, row in enumerate(block.table):
            kind = "td" if number else "th"
            cells = "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in row)
            parts.append(f"<tr>{cells}</tr>")
        if block.table:
            parts.append("</table></div>")
    return "\n".join([*parts, "</body></html>\n"])


def _named(block: Block) -> str:
    """The picture with its name for those who do not see it."""
    name = html.escape(block.heading, quote=True)
    return block.svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def as_markdown(found: Sequence[Block], pictures: Sequence[str]) -> str:
    """The same; ``pictures`` are the names of the files of its plots, in order."""
    names, parts = iter(pictures), []
    for index, block in enumerate(found):
        parts.append(f"{'##' if index else '#'} {block.heading}")
        if block.text:
            parts.append(block.text)
        if block.svg:
            parts.append(f"![{block.heading}]({next(names)})")
        if block.table:
            rows = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in block.table]
            rule = "| --- |" + " ---: |" * (len(block.table[0]) - 1)
            parts.append("\n".join([rows[0], rule, *rows[1:]]))
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def write(found: Sequence[Block], path: str) -> None:
    """Write ``path``, and beside it the Markdown and its pictures, each in one piece.

    Raises:
      InputError: they cannot be written.
    """
    place = pathlib.Path(path)
    svgs = [block.svg for block in found if block.svg]
    names = [f"{place.stem}_{index}.svg" for index in range(1, len(svgs) + 1)]
    files = dict(zip(names, svgs, strict=True))
    files |= {place.with_suffix(".md").name: as_markdown(found, names), place.name: as_html(found)}
    for name, content in files.items():
        part = place.with_name(f"{name}.part")
        try:
            part.write_text(content, "utf-8")
            os.replace(part, place.with_name(name))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(f"--report: expected a writable file, found {path}") from error

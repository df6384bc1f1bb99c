"""What objects look like in a notebook: a heading and a table that fit a screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

MOST_ROWS = 24
"""Rows of a table; of what is longer the first are shown, with the number of the others."""


def html_table(heading: str, titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A heading and a table in HTML; everything is escaped."""
    every = [[escape(str(cell)) for cell in row] for row in rows]
    shown = every[:MOST_ROWS]
    head = "".join(f"<th style='text-align:left'>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in row) + "</tr>" for row in shown
    )
    more = f"<div>and {len(every) - len(shown)} more</div>" if len(every) > len(shown) else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if every else ""
    return f"<div style='overflow-x:auto'><div><b>{escape(heading)}</b></div>{table}{more}</div>"

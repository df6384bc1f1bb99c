"""The HTML report of `optc compare`: artifacts of one model side by side, in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optc.compiler.artifact.sizes import Sizes
from optc.compiler.diagnostics import os_errors
from optc.compiler.files import replace_file
from optc.exporters.reports.page import render_page


def write_comparison(path: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> None:
    """Write the report of what `optc compare` measured.

    Args:
        rows: title -> cell of each artifact.

    Raises:
        ResourceError, InputError: the file cannot be written.
    """
    text = render_page(
        "optc.exporters.reports",
        "comparison.html",
        source=result["source"],
        titles=list(dict.fromkeys(title for row in rows for title in row)),
        rows=rows,
        sizes=size_bars(result["artifacts"]),
        artifacts=result["artifacts"],
    )
    with os_errors("writing the report", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())


def size_bars(artifacts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each artifact with known sizes its parts: (title, bytes, share of the largest artifact in percent).

    All have the same parts in the same order: those of which one has any bytes.
    """
    known = [(row["artifact"], Sizes.read(row["sizes"])) for row in artifacts if row["sizes"] is not None]
    filled = {place for _, sizes in known for place, (_, size) in enumerate(sizes.parts()) if size}
    largest = max((sizes.total for _, sizes in known), default=0) or 1
    return [
        {
            "artifact": name,
            "total": sizes.total,
            "parts": [
                (title, size, 100 * size / largest)
                for place, (title, size) in enumerate(sizes.parts())
                if place in filled
            ],
        }
        for name, sizes in known
    ]

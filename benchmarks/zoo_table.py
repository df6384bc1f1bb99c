"""docs/models.md: the tables between its markers say what benchmarks/results/zoo.json says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

OUTCOMES = ("exact", "refused", "gate", "wrong", "crashed", "hung")
BEGIN, END = "<!-- zoo: made by `python benchmarks/zoo.py --docs` -->", "<!-- /zoo -->"


def write_docs(data: dict[str, Any], file: Path) -> None:
    """Replace what stands between the markers of a file."""
    text = file.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{file} has no place for the tables: {BEGIN} ... {END}")
    file.write_text(before + section(data) + after)


def section(data: dict[str, Any]) -> str:
    """The section with its markers."""
    stages = data["stages"]
    lines = [BEGIN, "", f"transformers {data['transformers']}, torch {data['torch']}.", "", *_counts(stages), ""]
    for stage, rows in stages.items():
        lines += _table(stage, rows)
    return "\n".join([*lines, END])


def _counts(stages: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| | head | built | " + " | ".join(OUTCOMES) + " | not built |", "|---" * (len(OUTCOMES) + 4) + "|"]
    for stage, rows in stages.items():
        for head in (*dict.fromkeys(name.split(":")[0] for name in rows), "all"):
            count = Counter(row["outcome"] for name, row in rows.items() if head in ("all", name.split(":")[0]))
            built = sum(count[outcome] for outcome in OUTCOMES)
            cells = [stage, head, str(built), *(str(count[outcome]) for outcome in OUTCOMES), str(count["not built"])]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _table(stage: str, rows: dict[str, Any]) -> list[str]:
    """The types that are exact, in one line for each head, and the others with their reasons."""
    lines = [f"### {stage}", ""]
    for head in dict.fromkeys(name.split(":")[0] for name in rows):
        exact = [
            name.split(":")[1]
            for name, row in rows.items()
            if name.startswith(f"{head}:") and row["outcome"] == "exact"
        ]
        lines += [f"Exact, {head}: {', '.join(exact) or 'none'}.", ""]
    groups: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():
        if row["outcome"] in OUTCOMES[1:]:
            groups.setdefault((row["outcome"], _reason(row)), []).append(name)
    if groups:
        lines += ["| outcome | reason | types |", "|---|---|---|"]
        order = sorted(groups, key=lambda key: (OUTCOMES.index(key[0]), -len(groups[key]), key[1]))
        lines += [f"| {outcome} | {reason} | {', '.join(groups[outcome, reason])} |" for outcome, reason in order]
        lines.append("")
    return lines


def _reason(row: dict[str, Any]) -> str:
    """In a cell: short, without what differs between types of one kind."""
    text = re.sub(r"[|`<>]", " ", row.get("reason", ""))
    text = re.sub(r"\d+\.\d+(e[-+]?\d+)?", "…", text) if row["outcome"] in ("gate", "wrong") else text
    return text if len(text) <= 160 else text[:159] + "…"

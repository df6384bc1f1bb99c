"""docs/models.md: the tables between its markers say what benchmarks/results/zoo.json says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

OUTCOMES = ("exact", "uncached", "refused", "gate", "wrong", "crashed", "hung")
HEADS = ("causal", "masked", "encoder")
"""Of text, by transformers' own lists."""
OTHERS = ("picture", "answers")
"""Some types of each: no share of all."""
BEGIN, END = "<!-- zoo: made by `python benchmarks/zoo.py --docs` -->", "<!-- /zoo -->"

Stages = dict[str, dict[str, Any]]


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
    stages: Stages = data["stages"]
    parts = [_made_by(stages), *_counts(stages), "", *_everywhere(stages), *_others(stages)]
    return "\n".join([BEGIN, "", *parts, END])


def _made_by(stages: Stages) -> str:
    """Which versions the rows of each stage were made with."""
    lines = []
    for stage, rows in stages.items():
        count = Counter((row["torch"], row["transformers"]) for row in rows.values() if row["outcome"] in OUTCOMES)
        made = ", ".join(
            f"{number} with torch {torch} and transformers {version}"
            for (torch, version), number in sorted(count.items(), reverse=True)
        )
        lines.append(f"{stage}: {made}. ")
    return "Types by stage: " + "".join(lines).strip() + "\n"


def _counts(stages: Stages) -> list[str]:
    lines = ["| | head | built | " + " | ".join(OUTCOMES) + " | not built |", "|---" * (len(OUTCOMES) + 4) + "|"]
    for stage, rows in stages.items():
        present = {name.split(":")[0] for name in rows}
        for head in (
            *(head for head in HEADS if head in present),
            "all text",
            *(head for head in OTHERS if head in present),
        ):
            heads = HEADS if head == "all text" else (head,)
            count = Counter(row["outcome"] for name, row in rows.items() if name.split(":")[0] in heads)
            built = sum(count[outcome] for outcome in OUTCOMES)
            numbers = [str(count[outcome]) for outcome in (*OUTCOMES, "not built")]
            if built:
                numbers[0] += f" ({count['exact'] / built:.1%})"
            lines.append("| " + " | ".join([stage, head, str(built), *numbers]) + " |")
    return lines


def _everywhere(stages: Stages) -> list[str]:
    """The types that are exact in every stage, a line for each head."""
    lines = []
    for head in (*HEADS, *OTHERS):
        exact = [
            name.split(":")[1]
            for name in _built(stages)
            if name.startswith(f"{head}:")
            and all(rows.get(name, {}).get("outcome") == "exact" for rows in stages.values())
        ]
        if exact or head in HEADS:
            lines += [f"Exact in every stage, {head}: {', '.join(exact) or 'none'}.", ""]
    return lines


def _others(stages: Stages) -> list[str]:
    """The other types, a column for each stage; those of one fate in one row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in _built(stages):
        cells = tuple(_cell(rows.get(name)) for rows in stages.values())
        if set(cells) != {"exact"}:
            groups.setdefault(cells, []).append(name)
    if not groups:
        return []
    lines = ["| types | " + " | ".join(stages) + " |", "|---" * (len(stages) + 1) + "|"]
    for cells, names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[1])):
        shown = [
            "the same" if index and cell == cells[index - 1] and cell not in ("exact", "not run") else cell
            for index, cell in enumerate(cells)
        ]
        lines.append(f"| {', '.join(names)} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _built(stages: Stages) -> list[str]:
    names = {name for rows in stages.values() for name, row in rows.items() if row["outcome"] in OUTCOMES}
    return sorted(names)


def _cell(row: dict[str, Any] | None) -> str:
    """Outcome and reason, short, without what differs between types of one kind."""
    if row is None or row["outcome"] == "not built":
        return "not run" if row is None else "not built"
    if row["outcome"] == "exact":
        return "exact"
    text = re.sub(r"[|`<>]", " ", f"{row['outcome']}: {row.get('reason', '')}")
    text = re.sub(r"\d+\.\d+(e[-+]?\d+)?", "…", text) if row["outcome"] in ("gate", "wrong") else text
    return text if len(text) <= 160 else text[:159] + "…"

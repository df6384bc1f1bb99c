"""The difference between two IR texts.

Two texts are first aligned without regard to value names (a re-traced program numbers its nodes anew).
Where a line of the second text is the same operation on the same values, its value is shown under the
name it has in the first, and so is a value that took the place of a removed one: what is left is what a
pass changed, not what it renamed. Source lines do not count as changes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

from optc.compiler.diagnostics import InputError

MOST_PAIRS = 1 << 24
"""Of equal lines, each of which takes time: a hundred layers of 200 lines have 2 million."""
_NAME = re.compile(r"%([A-Za-z_]\w*)")
_DEFINITION = re.compile(r"%([A-Za-z_]\w*): ")
_INPUT = re.compile(r"^\S* +%([A-Za-z_]\w*): ")
_OPERATOR = re.compile(r" = (?:([\w.]+)\(|%)")
_SOURCE = re.compile(r"( ·|    #) [^ ·]+:\d+$")


def diff_text(a: str, b: str, *, name_a: str, name_b: str, context: int = 2) -> str:
    """A unified diff of two texts of `format_program`, with a summary line at its end.

    Args:
        name_a: what to call the first text.
        name_b: what to call the second.
        context: unchanged lines around a change.

    Returns:
        Lines `--- name_a`, `+++ name_b`, hunks, and a summary that counts calls by operator: `-` removed,
        `+` added, `~` same operator on other values.

    Raises:
        InputError: so many lines are equal that it would take minutes.
    """
    lines_a, lines_b = a.splitlines(), b.splitlines()
    names = _names_in_a(lines_a, lines_b)
    lines_b = _rename(lines_b, names)
    matcher = _match([_SOURCE.sub("", line) for line in lines_a], [_SOURCE.sub("", line) for line in lines_b])
    rows = [f"--- {name_a}", f"+++ {name_b}"]
    removed: list[str] = []
    added: list[str] = []
    for group in matcher.get_grouped_opcodes(context):
        first, last = group[0], group[-1]
        rows.append(f"@@ -{_range(first[1], last[2])} +{_range(first[3], last[4])} @@")
        for tag, a_start, a_end, b_start, b_end in group:
            if tag == "equal":
                rows += [f" {line}" for line in lines_a[a_start:a_end]]
                continue
            rows += [f"-{line}" for line in lines_a[a_start:a_end]]
            rows += [f"+{line}" for line in lines_b[b_start:b_end]]
            removed += lines_a[a_start:a_end]
            added += lines_b[b_start:b_end]
    if any(new != old for new, old in names.items()):
        rows.append(f"(values of {name_b} are shown under their names in {name_a})")
    counts = [sum(_operator(line) is not None for line in lines) for lines in (lines_a, lines_b)]
    rows.append(f"nodes {counts[0]} -> {counts[1]}: {_summary(removed, added) or 'no change'}")
    return "\n".join(rows) + "\n"


def _match(a: Sequence[str], b: Sequence[str]) -> SequenceMatcher[str]:
    counts = Counter(b)
    pairs = sum(counts[line] for line in a)
    if pairs > MOST_PAIRS:
        raise InputError(
            "the texts repeat themselves too much to be compared",
            where=f"{len(a)} and {len(b)} lines",
            why=f"{pairs} pairs of lines are equal, and at most {MOST_PAIRS} are looked at",
            remedy="use diff -u on the files of the stages",
        )
    return SequenceMatcher(None, a, b, autojunk=False)


def _range(start: int, end: int) -> str:
    """A line range as unified diffs write it."""
    size = end - start
    return f"{start + 1 if size else start}" + ("" if size == 1 else f",{size}")


def _anonymous(line: str) -> str:
    return _NAME.sub("%", _SOURCE.sub("", line))


def _definitions(lines: Sequence[str]) -> list[str]:
    """The names of the values that node lines define."""
    return [found[1] for line in lines if (found := _DEFINITION.match(line))]


def _operator(line: str) -> str | None:
    """The operator that a node line calls, None for other lines."""
    found = _OPERATOR.search(line) if line.startswith("%") else None
    return None if found is None else found[1] or "getitem"


def _names_in_a(a: Sequence[str], b: Sequence[str]) -> dict[str, str]:
    """Names of b's values -> the names that the same values have in a. Inputs keep their names."""
    names: dict[str, str] = {}
    removed: set[str] = set()
    added: list[str] = []
    pairs: list[tuple[str, str]] = []
    matcher = _match([_anonymous(line) for line in a], [_anonymous(line) for line in b])
    for tag, a_start, a_end, b_start, b_end in matcher.get_opcodes():
        if tag == "equal":
            pairs += zip(a[a_start:a_end], b[b_start:b_end], strict=True)
        else:
            removed.update(_definitions(a[a_start:a_end]))
            added += _definitions(b[b_start:b_end])
    for line_a, line_b in pairs:
        names.update(zip(_definitions([line_b]), _definitions([line_a]), strict=True))
    taken = set(names.values()) | {found[1] for line in b if (found := _INPUT.search(line))}
    for line_a, line_b in pairs:
        # The same operation reads a removed value here and an added one there: it took its place.
        for old, new in zip(_NAME.findall(line_a), _NAME.findall(line_b), strict=True):
            if old in removed - taken and new in added and new not in names:
                names[new] = old
                taken.add(old)
    for new in added:
        fresh = names.get(new, new)
        while new not in names and fresh in taken:
            fresh += "_"
        names[new] = fresh
        taken.add(fresh)
    return names


def _rename(lines: Sequence[str], names: dict[str, str]) -> list[str]:
    return [_NAME.sub(lambda found: "%" + names.get(found[1], found[1]), line) for line in lines]


def _summary(removed: Sequence[str], added: Sequence[str]) -> str:
    """Calls by operator: removed, added, and those that stayed with other operands."""
    old, new = (
        {(*_definitions([line]), _operator(line)) for line in lines if _operator(line)} for lines in (removed, added)
    )
    parts = []
    for sign, calls in (("-", old - new), ("+", new - old), ("~", old & new)):
        counts = Counter(str(operator) for *_, operator in calls)
        parts += [f"{sign} {count} {name}" for name, count in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
    return ", ".join(parts)

"""The drift of every pass as a table, for terminals and reports: from the stage before, and since the capture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

_FORMS = {
    "max_abs_diff": ("max |diff|", "{:.1e}"),
    "relative_error": ("relative error", "{:.1e}"),
    "cosine": ("cosine", "{:.5f}"),
    "kl": ("KL", "{:.1e}"),
    "top1_agreement": ("top-1", "{:.1%}"),
    "perplexity_increase": ("perplexity", "{:+.1%}"),
}
_DISTRIBUTIONS = ("kl", "top1_agreement", "perplexity_increase")
_TENSORS = ("relative_error", "cosine")
EMPTY = "–"

Row = Mapping[str, Any]
"""A PassRecord as plain values."""


def _written(key: str, value: float | None) -> str:
    if value is None:
        return EMPTY
    return _FORMS[key][1].format(value) if value else "0"


def drift_table(
    passes: Sequence[Row], written: Callable[[str, float | None], str] = _written
) -> tuple[list[str], list[list[str]]]:
    """(titles, cells of each pass): the measures that say most of these outputs, and were taken.

    Args:
        written: the text of a measure, by its field in `DriftRecord`.
    """
    known = [row[part] for row in passes for part in ("drift", "since_capture") if row[part] is not None]
    taken = {key for drift in known for key, value in drift.items() if value is not None}
    kinds = [key for key in (_DISTRIBUTIONS if "kl" in taken else _TENSORS) if key in taken]
    columns = [("drift", key) for key in ("max_abs_diff", *kinds)] + [("since_capture", key) for key in kinds]
    titles = [f"{'sum: ' if part == 'since_capture' else ''}{_FORMS[key][0]}" for part, key in columns]
    return titles, [[written(key, (row[part] or {}).get(key)) for part, key in columns] for row in passes]


def program_title(role: str, roles: Collection[str]) -> str:
    """A program among those of its artifact; what reads an encoder is called the decoder."""
    return "decoder" if role == "model" and "encoder" in roles else role


def pass_title(name: str, program: str) -> str:
    """A pass, with the program that it rewrote where that is not the model itself."""
    return name if program == "model" else f"{program}: {name}"

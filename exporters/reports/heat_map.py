"""Bits of each weight by layer and projection: where a method chose how many each gets."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.exporters.reports.charts import Cell, HeatMap

_NUMBER = re.compile(r"(?<=\.)\d+(?=[.\[]|$)")
_SUFFIX = re.compile(r"(\.weight)?(\[\d+\])?$")
_LIGHTEST, _DARKEST = 0.1, 0.95


def layer_of(name: str) -> tuple[str, int] | None:
    """(what stands before the layer's number, the number) in a weight's name: its first part that is a number."""
    found = _NUMBER.search(name)
    return None if found is None else (name[: found.start() - 1], int(found[0]))


def projection_of(name: str) -> str:
    """What stands behind the layer's number, experts as "*"; the whole name where there is none."""
    plain = _SUFFIX.sub("", name)
    found = _NUMBER.search(plain)
    return plain if found is None else _NUMBER.sub("*", plain[found.end() :]).lstrip(".")


def bits_map(records: Sequence[LinearRecord]) -> HeatMap | None:
    """A heat map of bits, layers by projections; None where all weights of layers have the same number.

    Weights that share a field, as experts do, are written as a range and shaded by their mean. Weights outside of layers
    are in the note.
    """
    placed: dict[tuple[str, str], dict[int, list[LinearRecord]]] = defaultdict(lambda: defaultdict(list))
    outside = []
    for row in records:
        layer = layer_of(row.name)
        if layer is None:
            outside.append(row)
        else:
            placed[layer[0], projection_of(row.name)][layer[1]].append(row)
    bits = sorted({row.bits for fields in placed.values() for rows in fields.values() for row in rows})
    if len(bits) < 2:
        return None
    layers = sorted({layer for fields in placed.values() for layer in fields})
    several = len({prefix for prefix, _ in placed}) > 1
    low, high = bits[0], bits[-1]

    def shade(mean: float) -> float:
        return round(_LIGHTEST + (_DARKEST - _LIGHTEST) * (mean - low) / (high - low), 3)

    return HeatMap(
        title="Bits of each weight: layers from left to right, projections from top to bottom",
        columns=[str(layer) for layer in layers],
        rows=[
            (
                f"{prefix}.*.{name}" if several else name,
                [_cell(fields[layer], shade) if layer in fields else None for layer in layers],
            )
            for (prefix, name), fields in placed.items()
        ],
        keys=[(shade(value), f"{value} bits") for value in bits],
        note=""
        if not outside
        else "Outside of layers: " + ", ".join(f"{row.name} {row.bits} bits" for row in outside[:8]),
    )


def _cell(rows: Sequence[LinearRecord], shade: Callable[[float], float]) -> Cell:
    bits = sorted({row.bits for row in rows})
    mean = sum(row.bits for row in rows) / len(rows)
    text = str(bits[0]) if len(bits) == 1 else f"{bits[0]}–{bits[-1]}"
    names = rows[0].name if len(rows) == 1 else f"{len(rows)} weights, {rows[0].name} the first"
    return Cell(shade(mean), text, f"{names}: {text} bits")

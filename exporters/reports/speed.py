"""The report's section on speed: what `optc bench --save` kept, as cards and a row per prompt length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optc.exporters.reports.charts import Card, Table
from optc.exporters.reports.figures import Figures, Section, float_of, interval_of, median_of, others_of
from optc.exporters.reports.numbers import EMPTY, number, size

_RATES = "prompts prompt_tokens ttft_ms first_ttft_ms prefill_tokens_per_s decode_tokens_per_s latency_ms rows_per_s"
_RUN = "inputs samples batch new_tokens sampling gpu environment"
_LIMITS = "peak_rss_bytes read_bytes_per_s weight_bytes weight_read_limit_tokens_per_s"
_SHOWN = {*_RATES.split(), *_RUN.split(), *_LIMITS.split()}
"""Keys that have a place of their own."""


def speed_section(found: Figures | None) -> Section | None:
    """What the template shows of the speed; None where nothing was measured."""
    if not found:
        return None
    prompts = found.get("prompts")
    rows = [row for row in prompts if isinstance(row, Mapping)] if isinstance(prompts, list | tuple) else []
    rows = rows or ([found] if "decode_tokens_per_s" in found else [])
    return Section(
        cards=_speed_cards(found, rows),
        note=_speed_note(found),
        tables=_prompt_table(rows),
        others=others_of(found, _SHOWN),
    )


def _speed_cards(found: Figures, rows: Sequence[Figures]) -> list[Card]:
    cards = []
    for key, label, unit in (
        ("decode_tokens_per_s", "decode", "tokens/s"),
        ("prefill_tokens_per_s", "prefill", "tokens/s"),
        ("ttft_ms", "time to first token", "ms"),
    ):
        if rows and (median := median_of(rows[0], key)) is not None:
            length = float_of(rows[0], "prompt_tokens")
            behind = "" if length is None else f"behind a prompt of {length:,.0f} tokens"
            cards.append(Card(f"{number(median)} {unit}", label, behind))
    for key, label, unit in (("latency_ms", "latency of a call", "ms"), ("rows_per_s", "throughput", "rows/s")):
        if (median := median_of(found, key)) is not None:
            cards.append(Card(f"{number(median)} {unit}", label, interval_of(found, key)))
    if (peak := float_of(found, "peak_rss_bytes")) is not None:
        cards.append(Card(size(peak), "peak memory", "resident, of the whole process"))
    limit, rate = float_of(found, "weight_read_limit_tokens_per_s"), float_of(found, "read_bytes_per_s")
    if limit is not None and rate is not None:
        note = f"each weight read once per step, at {size(rate)}/s"
        cards.append(Card(f"{number(limit)} tokens/s", "limit by memory bandwidth", note))
    return cards


def _prompt_table(rows: Sequence[Figures]) -> list[Table]:
    """A row per prompt length: medians with their 95 % intervals."""
    if not rows:
        return []
    cells = []
    for row in rows:
        length = float_of(row, "prompt_tokens")
        first = float_of(row, "first_ttft_ms")
        measured = [
            text
            for key in ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
            for text in (number(median_of(row, key)), interval_of(row, key, "") or EMPTY)
        ]
        cells.append((EMPTY if length is None else f"{length:,.0f}", *measured, number(first)))
    titles = (
        "prompt tokens",
        "TTFT, ms",
        "95 %",
        "prefill, tokens/s",
        "95 %",
        "decode, tokens/s",
        "95 %",
        "first TTFT, ms",
    )
    return [Table(titles, cells, frozenset())]


def _speed_note(found: Figures) -> str:
    parts = []
    for key, text in (
        ("samples", "medians of {:.0f} samples"),
        ("batch", "batch {:.0f}"),
        ("new_tokens", "{:.0f} new tokens"),
    ):
        if (value := float_of(found, key)) is not None:
            parts.append(text.format(value))
    inputs = found.get("inputs")
    if isinstance(inputs, Mapping):
        parts += [
            f"{name} {'×'.join(map(str, spec[1:]))}" for name, spec in inputs.items() if isinstance(spec, list | tuple)
        ]
    sampling = found.get("sampling")
    if isinstance(sampling, Mapping):
        drawn = float_of(sampling, "temperature")
        parts.append(f"drawn at temperature {drawn:g}" if drawn else "greedy")
    place = found.get("environment")
    if isinstance(found.get("gpu"), str) and found["gpu"]:
        parts.append(found["gpu"])
    elif isinstance(place, Mapping):
        threads = float_of(place, "threads")
        parts.append(
            str(place.get("cpu", ""))
            + ("" if threads is None else f", {threads:.0f} thread{'s' if threads > 1 else ''}")
        )
    if isinstance(place, Mapping) and isinstance(place.get("versions"), Mapping):
        parts.append(" ".join(f"{name} {version}" for name, version in place["versions"].items()))
    return " · ".join(filter(None, parts))

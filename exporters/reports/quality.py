"""The report's section on quality: what `optc eval --save` kept, as cards, a table of tasks and a sample."""

from __future__ import annotations

from collections.abc import Mapping

from optc.exporters.reports.charts import Card, Table
from optc.exporters.reports.figures import Figures, Sample, Section, float_of, others_of, pair_of, sample_of
from optc.exporters.reports.numbers import EMPTY, number, percent

_TEXT = "tokens windows window perplexity perplexity_ci95 reference_perplexity kl top_k top_k_kl top1_agreement text"
_TENSORS = "beside batches rows accuracy labelled reference_accuracy top1 relative_error cosine max_abs_diff"
_BOTH = "seconds source source_matches tasks sample"
_SHOWN = {*_TEXT.split(), *_TENSORS.split(), *_BOTH.split()}
"""Keys that have a place of their own."""


def quality_section(found: Figures | None) -> Section | None:
    """What the template shows of the quality; None where nothing was measured."""
    if not found:
        return None
    return Section(
        cards=[*_text_cards(found), *_tensor_cards(found)],
        note=_quality_note(found),
        tables=_tasks(found),
        sample=_greedy(found),
        others=others_of(found, _SHOWN),
    )


def _text_cards(found: Figures) -> list[Card]:
    cards = []
    perplexity, before = float_of(found, "perplexity"), float_of(found, "reference_perplexity")
    if perplexity is not None:
        interval = pair_of(found, "perplexity_ci95")
        spread = "" if interval is None else f"95 %: {number(interval[0], 4)} to {number(interval[1], 4)}"
        change = (
            ""
            if not before
            else f"{percent(perplexity / before - 1, 2, signed=True)} to the source's {number(before, 4)}"
        )
        cards.append(Card(number(perplexity, 4), "perplexity", "; ".join(filter(None, (change, spread)))))
    if (kl := float_of(found, "kl")) is not None:
        unit = "nats per token" if perplexity is not None else "nats per row"
        cards.append(Card(number(kl), "KL divergence from the source", unit))
    if (kl := float_of(found, "top_k_kl")) is not None:
        cards.append(Card(number(kl), f"KL over the source's {found.get('top_k')} likeliest tokens", "nats per token"))
    if (share := float_of(found, "top1_agreement")) is not None:
        cards.append(Card(percent(share, 2), "same most likely token", "as the source"))
    return cards


def _tensor_cards(found: Figures) -> list[Card]:
    cards = []
    if (accuracy := float_of(found, "accuracy")) is not None:
        before = float_of(found, "reference_accuracy")
        rows = float_of(found, "labelled")
        note = "" if before is None else f"the source: {percent(before, 2)}"
        on = "" if rows is None else f"on {rows:,.0f} labelled rows"
        cards.append(Card(percent(accuracy, 2), "accuracy", "; ".join(filter(None, (note, on)))))
    if (share := float_of(found, "top1")) is not None:
        cards.append(Card(percent(share, 2), "same most likely class", "as what it is compared with"))
    if (error := float_of(found, "relative_error")) is not None:
        cards.append(Card(number(error), "relative error of the outputs", "L2 norm of the difference, as a share"))
    if (cosine := float_of(found, "cosine")) is not None:
        cards.append(Card(f"{cosine:.5f}", "cosine of the outputs"))
    if (gap := float_of(found, "max_abs_diff")) is not None:
        cards.append(Card(number(gap), "largest difference", "of any output"))
    return cards


def _quality_note(found: Figures) -> str:
    parts = []
    if isinstance(found.get("text"), str):
        parts.append(f"on {found['text']}")
    windows, window = float_of(found, "windows"), float_of(found, "window")
    if windows is not None and window is not None:
        parts.append(f"{windows:.0f} window{'s' if windows > 1 else ''} of {window:,.0f} predicted tokens")
    rows, batches = float_of(found, "rows"), float_of(found, "batches")
    if rows is not None and batches is not None:
        parts.append(f"on {rows:,.0f} rows in {batches:.0f} batch{'es' if batches > 1 else ''}")
    against = found.get("source") or found.get("beside")
    if isinstance(against, str):
        parts.append(f"beside {against}" + (" (other weights)" if found.get("source_matches") is False else ""))
    if (time := float_of(found, "seconds")) is not None:
        parts.append(f"{time:.1f} s")
    return ", ".join(parts)


def _tasks(found: Figures) -> list[Table]:
    """A row for each metric of each task of lm-eval."""
    tasks, rows = found.get("tasks"), []
    for task, metrics in tasks.items() if isinstance(tasks, Mapping) else ():
        for metric, figure in metrics.items() if isinstance(metrics, Mapping) else ():
            if isinstance(figure, Mapping) and isinstance(figure.get("value"), float | int):
                error = float_of(figure, "stderr")
                rows.append(
                    (str(task), str(metric), f"{figure['value']:.4f}", EMPTY if error is None else f"± {error:.4f}")
                )
    return [Table(("task", "metric", "value", "standard error"), rows, frozenset({0, 1}))] if rows else []


def _greedy(found: Figures) -> Sample | None:
    given = found.get("sample")
    if not isinstance(given, Mapping) or not all(isinstance(given.get(key), str) for key in ("prompt", "artifact")):
        return None
    columns = [("this artifact", given["artifact"])]
    note, same, count = "", float_of(given, "same_tokens"), float_of(given, "tokens")
    if isinstance(given.get("source"), str):
        columns.insert(0, ("the source", given["source"]))
        if same is not None and count:
            note = (
                "all tokens are the same"
                if same >= count
                else f"the first {same:.0f} of {count:.0f} tokens are the same"
            )
    return sample_of(given["prompt"], columns, note)

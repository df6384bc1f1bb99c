"""report.html of a training run: curves, a sample, memory and config. Self-contained: no network, no fonts, no script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optc.compiler.version import version
from optc.exporters.reports.charts import Card, color
from optc.exporters.reports.figures import plain_text, sample_of
from optc.exporters.reports.numbers import count, number, seconds, size
from optc.exporters.reports.page import write_page
from optc.exporters.reports.sizes import Segment, SizeBar
from optc.training.curves import training_charts
from optc.training.metrics import Memory, StepRecord
from optc.training.result import TrainResult


def write_train_report(directory: Path, result: TrainResult, records: Sequence[StepRecord]) -> None:
    """Write `report.html` into the folder of a trained model.

    Raises:
        ResourceError, InputError: the file cannot be written.
    """
    memory = records[-1].memory
    write_page(
        directory,
        "optc.training",
        "train_report.html",
        r=result,
        title=Path(result.output).name,
        version=version(),
        cards=list(_cards(result, records)),
        charts=training_charts(records, result.validation),
        sample=_sample(result),
        memory=None if memory is None else _memory(memory),
        peak=0 if memory is None else memory.peak,
        events=[(row.step, row.skipped) for row in records if row.skipped is not None],
        resumed=[row.step - 1 for row in records if row.resumed],
        config=list(_flat(result.config)),
    )


def _cards(result: TrainResult, records: Sequence[StepRecord]) -> Iterator[Card]:
    first, last = result.first_loss, result.last_loss
    yield Card(f"{_loss(first)} → {_loss(last)}", "training loss", "first step and last, nats per label token")
    if (held_out := result.validation) is not None:
        note = f"at the start, and at its best in step {held_out.best_step}"
        yield Card(f"{_loss(held_out.first)} → {_loss(held_out.best)}", "validation loss", note)
    yield Card(f"{result.steps:,}", "steps", f"{count(result.tokens)} label tokens")
    yield Card(seconds(result.seconds), "time in steps", f"{number(result.tokens / result.seconds)} tokens/s")
    yield Card(count(result.trainable), "trainable parameters", f"of {count(result.parameters)}")
    yield Card(result.config["precision"], "compute type", result.config["optimizer"]["name"])
    if records[-1].memory is not None:
        yield Card(size(records[-1].memory.peak), "peak memory", "of the process, or of the GPU")


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _memory(memory: Memory) -> SizeBar:
    """What one step holds, as a bar of its parts."""
    parts = {name: int(getattr(memory, name)) for name in ("weights", "gradients", "optimizer", "activations")}
    total = sum(parts.values()) or 1
    segments = [
        Segment(color(index), round(100 * value / total, 3), name, f"{name}: {size(value)}")
        for index, (name, value) in enumerate(parts.items())
        if value
    ]
    return SizeBar("weights, gradients, optimizer state and activations", size(total), segments)


def _sample(result: TrainResult) -> Any:
    found = result.sample
    if found is None:
        return None
    return sample_of(
        found.prompt, [("before the first step", found.before), ("with the weights of the output", found.after)]
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as a recipe has it)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if type(value) in (int, float) else plain_text(value)

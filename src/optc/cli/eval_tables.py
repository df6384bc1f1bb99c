"""What `optc eval` prints: the figures of one artifact, or a table of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from optc.cli.common import say


def show_one(result: dict[str, Any]) -> None:
    """Print the figures of one artifact."""
    if "perplexity" in result:
        _show_text(result)
    for task, row in result.get("tasks", {}).items():
        for metric, figure in row.items():
            if isinstance(figure, dict):
                say(f"{task:20} {metric} {_figure(figure)}")


def _show_text(result: dict[str, Any]) -> None:
    interval = result["perplexity_ci95"]
    spread = "" if interval is None else f"  (95 %: {interval[0]:.3f} to {interval[1]:.3f})"
    say(f"tokens               {result['tokens']} in {result['windows']} window(s) of {result['window']}")
    say(f"perplexity           {result['perplexity']:.4f}{spread}")
    if result["kl"] is not None:
        say(f"reference perplexity {result['reference_perplexity']:.4f}  ({result['source']})")
        say(f"KL(source||artifact) {result['kl']:.3e} nats per token")
        if result["top_k_kl"] is not None:
            say(f"KL of the top {result['top_k']:<6} {result['top_k_kl']:.3e} nats per token")
        say(f"top-1 agreement      {100 * result['top1_agreement']:.2f} %")


def _figure(figure: dict[str, Any]) -> str:
    value, error = figure["value"], figure["stderr"]
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if error is None else f"{text} ± {error:.4f}"


def show_table(result: dict[str, Any]) -> None:
    """Print a row for each artifact."""
    rows = result["results"]
    first = rows[0]
    if first.get("kl") is not None:
        say(f"reference perplexity {first['reference_perplexity']:.4f}  ({first['source']})")
    against = {item["second"]: item for item in result.get("differences", []) if item["first"] == first["artifact"]}
    table = Table(box=None, header_style="bold")
    columns = {"artifact": [row["artifact"] for row in rows], **_columns(rows)}
    if "perplexity" in first:
        columns["gain (95 %)"] = [_gain(against.get(row["artifact"])) for row in rows]
    for title in columns:
        table.add_column(title, justify="left" if title == "artifact" else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console = Console(width=sum(max(map(len, [title, *cells])) + 3 for title, cells in columns.items()))
    with console.capture() as text:
        console.print(table)
    say("\n".join(line.rstrip() for line in text.get().splitlines()))
    if "perplexity" in first:
        say("gain: log-likelihood per token over the first artifact, nats; paired over windows")


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Title -> a cell per artifact."""
    first, columns = rows[0], {}
    forms = {"perplexity": ("perplexity", "{:.4f}")}
    if first.get("kl") is not None:
        forms["KL"] = ("kl", "{:.3e}")
        if first["top_k"] is not None:
            forms[f"top-{first['top_k']} KL"] = ("top_k_kl", "{:.3e}")
        forms["top-1"] = ("top1_agreement", "{:.2%}")
    forms["seconds"] = ("seconds", "{:.1f}")
    if "perplexity" in first:
        columns = {title: [form.format(row[key]) for row in rows] for title, (key, form) in forms.items()}
    for task, found in first.get("tasks", {}).items():
        for metric, figure in found.items():
            if isinstance(figure, dict):
                columns[f"{task} {metric}"] = [_figure(row["tasks"][task][metric]) for row in rows]
    return columns


def _gain(item: dict[str, Any] | None) -> str:
    """A difference in log-likelihood with its interval; "-" for the first artifact."""
    if item is None:
        return "-"
    text = f"{item['log_likelihood']:+.5f}"
    return text if item["ci95"] is None else f"{text} ({item['ci95'][0]:+.5f} to {item['ci95'][1]:+.5f})"

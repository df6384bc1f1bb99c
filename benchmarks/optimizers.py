"""AdamW, Lion and Sophia from scratch on the example model's shape, for one budget of steps.

    python benchmarks/optimizers.py --text TEXT [--steps 250] [--search-steps 60]

Each optimizer first tries three learning rates for a few steps; the best one runs the whole budget. All see the same
batches. Writes benchmarks/results/optimizers.json and docs/optimizers.svg.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, record

RATES = {"adamw": (1e-3, 3e-3, 1e-2), "lion": (1e-4, 3e-4, 1e-3), "sophia": (3e-4, 1e-3, 3e-3)}
COLORS = {"adamw": "#2563eb", "lion": "#d97706", "sophia": "#059669"}
TAIL = 20  # steps whose mean loss is compared


def run(name: str, rate: float, text: Path, steps: int, batch_size: int, seq_len: int) -> dict[str, Any]:
    """Train from scratch; the loss of each step, nats per token."""
    from optc.training.recipe import load_config
    from optc.training.setup import prepare
    from optc.training.step import train_step
    from optc.training.world import World

    values = {
        "model": str(ROOT / "examples" / "fiction-3m"),
        "data.text": [str(text)],
        "max_steps": steps,
        "device": "cpu",
        "batch_size": batch_size,
        "seq_len": seq_len,
        "optimizer.name": name,
        "optimizer.lr": rate,
        "schedule.warmup_steps": max(1, steps // 20),
    }
    ready = prepare(load_config("pretrain", values=values), World())
    begin = time.perf_counter()
    losses = [train_step(ready, last_good=None).loss for _ in range(steps)]
    seconds = time.perf_counter() - begin
    finite = [loss for loss in losses if loss is not None]
    row = {"lr": rate, "final_loss": statistics.mean(finite[-TAIL:]), "seconds": seconds, "losses": losses}
    print(f"{name} at {rate:g}, {steps} steps: {row['final_loss']:.4f}, {seconds:.0f} s", flush=True)
    return row


def smooth(losses: list[float], width: int = 9) -> list[float]:
    return [statistics.mean(losses[max(0, at - width + 1) : at + 1]) for at in range(len(losses))]


def picture(rows: dict[str, dict[str, Any]]) -> str:
    """An SVG of the curves, smoothed over nine steps."""
    width, height, left, bottom = 720, 320, 50, 290
    curves = {name: smooth(row["losses"]) for name, row in rows.items()}
    low, high = min(min(curve) for curve in curves.values()), max(max(curve) for curve in curves.values())
    steps = max(len(curve) for curve in curves.values())

    def x(step: float) -> float:
        return left + step * (width - left - 10) / max(1, steps - 1)

    def y(loss: float) -> float:
        return 12 + (high - loss) / (high - low) * (bottom - 12)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for part in range(5):
        loss, step = low + (high - low) * part / 4, (steps - 1) * part / 4
        parts.append(f'<line x1="{left}" x2="{width - 10}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#d6d3d1"/>')
        parts.append(f'<text x="{left - 6}" y="{y(loss) + 4:.1f}" text-anchor="end" fill="#57534e">{loss:.2f}</text>')
        parts.append(
            f'<text x="{x(step):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#57534e">{step + 1:.0f}</text>'
        )
    for number, (name, curve) in enumerate(curves.items()):
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in enumerate(curve))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[name]}" stroke-width="1.6"/>')
        parts.append(f'<text x="{width - 90}" y="{30 + 16 * number}" fill="{COLORS[name]}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=3_000_000, help="read this much of the text")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--search-steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.batch_size, arguments.seq_len)
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "text.txt"
        text.write_text(arguments.text.read_text(encoding="utf-8")[: arguments.characters])
        search = {
            key: [run(key, rate, text, arguments.search_steps, *shape) for rate in rates]
            for key, rates in RATES.items()
        }
        best = {key: min(rows, key=lambda row: row["final_loss"])["lr"] for key, rows in search.items()}
        final = {key: run(key, rate, text, arguments.steps, *shape) for key, rate in best.items()}
    result = {
        "text": arguments.text.name,
        "steps": arguments.steps,
        "search_steps": arguments.search_steps,
        "tokens_per_step": arguments.batch_size * arguments.seq_len,
        "search": {key: {f"{row['lr']:g}": row["final_loss"] for row in rows} for key, rows in search.items()},
        "final": {key: {**row, "losses": [round(loss, 4) for loss in row["losses"]]} for key, row in final.items()},
    }
    record("optimizers", result, arguments.threads)
    (ROOT / "docs" / "optimizers.svg").write_text(picture(final))


if __name__ == "__main__":
    main()

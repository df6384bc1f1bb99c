"""Loss curves with products of linears in 8-bit floats beside those in bf16, from scratch, on real text.

    python benchmarks/train_fp8.py --model ../shared/models/fiction-26m --text ../shared/text/train.txt
    python benchmarks/train_fp8.py --model examples/fiction-3m --text examples/book.txt --steps 6 --batch-size 2 --seq-len 64

Of the model's folder the shape and the tokenizer are taken; weights are drawn with each seed, and both runs of a seed
see the same batches. The difference is that of the mean losses of the last fifth of the steps, over bf16's; beside it is
how far two seeds of bf16 are apart. What it does to the time of a step of 1B shape: benchmarks/train_throughput.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import record


def curve(model: Path, text: Path, seed: int, fp8: bool, given: argparse.Namespace) -> dict[str, Any]:
    """The loss of each step, nats per token, and the seconds of all."""
    from optc.training.recipe import load_config
    from optc.training.setup import prepare
    from optc.training.step import train_step
    from optc.training.world import World

    values = {
        "model": str(model),
        "data.text": [str(text)],
        "max_steps": given.steps,
        "batch_size": given.batch_size,
        "seq_len": given.seq_len,
        "optimizer.lr": given.lr,
        "schedule.warmup_steps": max(1, given.steps // 20),
        "precision": "bf16",
        "fp8.enabled": fp8,
        "seed": seed,
    }
    run = prepare(load_config("pretrain", values=values), World())
    begin = time.perf_counter()
    losses = [train_step(run, last_good=None).loss for _ in range(given.steps)]
    assert all(loss is not None for loss in losses)
    kind = "fp8" if fp8 else "bf16"
    print(f"seed {seed}, {kind}: {losses[-1]:.4f} after {time.perf_counter() - begin:.0f} s", flush=True)
    return {"losses": [round(loss, 5) for loss in losses if loss is not None], "notes": run.notes}


def tail(losses: list[float]) -> float:
    return statistics.mean(losses[-max(1, len(losses) // 5) :])


def main() -> None:
    """Train, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=8_000_000, help="read this much of the text")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "text.txt"
        text.write_text(given.text.read_text(encoding="utf-8")[: given.characters])
        for seed in range(given.seeds):
            pair = {kind: curve(given.model, text, seed, kind == "fp8", given) for kind in ("bf16", "fp8")}
            ends = {kind: tail(found["losses"]) for kind, found in pair.items()}
            rows.append({"seed": seed, "end": ends, "difference": ends["fp8"] / ends["bf16"] - 1, "runs": pair})
            print(f"seed {seed}: {ends['bf16']:.4f} and {ends['fp8']:.4f}: {rows[-1]['difference']:+.3%}", flush=True)
    plain = [row["end"]["bf16"] for row in rows]
    result = {
        "model": given.model.name,
        "text": given.text.name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "steps": given.steps,
        "tokens_per_step": given.batch_size * given.seq_len,
        "lr": given.lr,
        "largest_difference": max(abs(row["difference"]) for row in rows),
        "between_seeds": max(plain) / min(plain) - 1,
        "rows": rows,
    }
    record("train_fp8", result, torch.get_num_threads())


if __name__ == "__main__":
    main()

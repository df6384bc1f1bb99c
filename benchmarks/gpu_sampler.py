"""Choice of tokens on one GPU: microseconds per step, from float32 logits.

python benchmarks/gpu_sampler.py       # writes benchmarks/results/gpu_sampler.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import record
from gpu_timing import card, time_per_call

VOCABULARY = 128256
KINDS: dict[str, dict[str, float]] = {
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 50, top-p 0.9, min-p 0.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2},
}
NAMES = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def arguments(rows: int, options: dict[str, float]) -> list[Any]:
    """What `optc::sample_` takes behind the logits."""
    given = [
        torch.full((rows,), options[name], device="cuda", dtype=torch.int32 if name == "top_k" else torch.float32)
        if name in options
        else None
        for name in NAMES
    ]
    penal = "repetition_penalty" in options
    seen = torch.rand(rows, VOCABULARY, device="cuda") < 0.01 if penal else None
    counts = seen.int() if seen is not None else None
    seeds = torch.arange(rows, device="cuda")
    return [torch.ones(rows, device="cuda"), *given, seen, counts, seeds, seeds]


def measure() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for rows in (1, 64, 256):
        for shape, scale in (("peaked", 3.0), ("flat", 0.05)):
            logits = [torch.randn(rows, VOCABULARY, device="cuda") * scale for _ in range(4)]
            calls = {"argmax": lambda x: torch.ops.optc.argmax(x), "torch.argmax": lambda x: x.argmax(-1)}
            for name, options in KINDS.items():
                rest = arguments(rows, options)
                calls[name] = lambda x, rest=rest: torch.ops.optc.sample_(x, *rest)  # type: ignore[misc]
            for name, call in calls.items():
                seconds = time_per_call([lambda x=x, call=call: call(x) for x in logits])  # type: ignore[misc]
                figures[f"{rows} rows, {shape}, {name}"] = round(seconds * 1e6, 2)
                print(f"{rows:4} rows, {shape:6}, {name:34} {seconds * 1e6:9.2f} us", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    import optc.compiler.kernels  # noqa: F401  (registers the ops and their kernels)

    result = {**card(), "vocabulary": VOCABULARY, "microseconds": measure()}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1))
    else:
        record("gpu_sampler", result, threads=0)


if __name__ == "__main__":
    main()

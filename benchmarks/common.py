"""What every benchmark shares: a random model folder, interleaved rounds, and the JSON record."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOKENIZER = ROOT / "examples" / "fiction-3m"


def llama_sizes(*, layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> dict[str, int]:
    """Sizes of a Llama as its config names them."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
    }


LLAMA_8B = llama_sizes(layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256)
LLAMA_1B = llama_sizes(layers=16, hidden=2048, heads=32, kv_heads=8, mlp=8192, vocab=128256)
"""Llama 3 8B; Llama 3.2 1B, which ties its embeddings."""
LLAMA_SMALL = llama_sizes(layers=2, hidden=256, heads=4, kv_heads=2, mlp=512, vocab=512)
"""For a quick try."""
DECODER_115M = {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 4, "mlp": 2048, "vocab": 24576}
"""Arguments of `random_llama`: what a phone or a laptop runs."""

OPEN_GATE: dict[str, Any] = {
    "max_kl": float("inf"),
    "min_top1": 0.0,
    "max_perplexity_increase": float("inf"),
    "max_relative_error": float("inf"),
}
"""Limits of the gate for random weights, whose outputs mean nothing: it measures, and stops nothing."""


def open_gate_flags() -> list[str]:
    """`OPEN_GATE` on a command line."""
    return [text for name, limit in OPEN_GATE.items() for text in (f"--{name.replace('_', '-')}", f"{limit:g}")]


def genai_seconds(model: Any, prompt: list[int], steps: int) -> tuple[float, float]:
    """onnxruntime-genai's Generator, greedy: seconds to the first token, and of the steps after it."""
    import onnxruntime_genai as og

    parameters, length = og.GeneratorParams(model), len(prompt) + steps + 1
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    begin = time.perf_counter()
    generator.append_tokens(np.array(prompt, np.int32))
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(steps):
        generator.generate_next_token()
    return first - begin, time.perf_counter() - first


def random_llama(folder: Path, *, layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> int:
    """Write a random Llama in Hugging Face layout; returns its parameter count. It shows speed only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **llama_sizes(layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, mlp=mlp, vocab=vocab),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return sum(parameter.numel() for parameter in model.parameters())


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Call every contender once per round, in turn; returns the figures of the rounds after the warm-up.

    The order rotates from round to round, so that no contender always runs behind the same one.
    """
    names = list(contenders)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + warmup):
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            value = contenders[name]()
            if turn >= warmup:
                figures[name].append(value)
        print(f"round {turn + 1} of {rounds + warmup}", flush=True)
    return figures


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios, with a 95 % bootstrap interval."""
    from optc.runtime.measuring.benchmark import median_rate

    return median_rate([float(a / b) for a, b in zip(above, below, strict=True)]).to_dict()


def commit() -> str:
    """The commit that was measured, marked when the tree had changes; OPTC_COMMIT where there is no git."""
    if named := os.environ.get("OPTC_COMMIT"):
        return named
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def record(name: str, result: dict[str, Any], threads: int) -> Path:
    """Write benchmarks/results/NAME.json with the environment, the commit and the date."""
    from optc.runtime.measuring.benchmark import environment, read_bandwidth

    full = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": environment(threads),
        "read_bandwidth_gb_per_s": read_bandwidth(threads) / 1e9,
        **result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(full, indent=2, default=_plain) + "\n")
    print(json.dumps(full, indent=2, default=_plain))
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")

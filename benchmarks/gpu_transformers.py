"""The serving engine on the GPU beside transformers in one run: naive batches of 8, and its continuous batching.

    python benchmarks/gpu_transformers.py                  # a Llama of 8B shape with random weights, in bf16
    python benchmarks/gpu_transformers.py --small          # the same loop on the CPU, two layers

Greedy, without an end, requests of 128 tokens in and 128 out; prompts differ from round to round. `engine` has 256 of them
at once. `batches of 8` is `generate` on as many of them as `--naive` says, eight at a time: a batch starts when the one
before has ended; all are equally long, so nothing of it is padding. `continuous` is `generate_batch` on the same requests
as the engine's, by a manager that stays, with what it chooses itself (attention, CUDA graphs). Output tokens per second in
turns, medians; the engine over each, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleave, ratio, record
from gpu_serve import network, open_session, serve, settle, traffic

import optc
from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine

Work = list[tuple[list[int], int]]
BATCH = 8


def naive(model: Any, make: Callable[[], Work], count: int) -> float:
    """Tokens per second of `generate`, eight requests after eight."""
    work, tokens, begin = make()[:count], 0, time.perf_counter()
    for start in range(0, len(work), BATCH):
        rows, steps = [row for row, _ in work[start : start + BATCH]], work[start][1]
        ids = torch.tensor(rows, device=model.device)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=steps, **settings_of(steps))
        tokens += found[:, ids.shape[1] :].numel()
    seconds = time.perf_counter() - begin
    assert tokens == sum(steps for _, steps in work)
    return tokens / seconds


def continuous(model: Any, make: Callable[[], Work], memory: float) -> float:
    """Tokens per second of `generate_batch`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    work = make()
    steps = work[0][1]
    chosen = GenerationConfig(**{**settings_of(steps), "eos_token_id": -1})
    batching = ContinuousBatchingConfig(max_memory_percent=memory)
    begin = time.perf_counter()
    found = model.generate_batch(
        [row for row, _ in work],
        generation_config=chosen,
        continuous_batching_config=batching,
        persistent_manager=True,
        progress_bar=False,
    )
    seconds = time.perf_counter() - begin
    tokens = sum(len(item.generated_tokens) for item in found.values())
    assert tokens == sum(steps for _, steps in work), f"{tokens} tokens of {len(found)} requests"
    return tokens / seconds


def settings_of(steps: int) -> dict[str, Any]:
    return {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def main() -> None:
    """Open all three, measure in turns, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="*", default=["batches of 8", "continuous"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--naive", type=int, default=16, help="requests of `batches of 8` in a round")
    parser.add_argument("--blocks", type=int, default=4096, help="of 64 tokens, of this engine's KV pool")
    parser.add_argument("--memory", type=float, default=0.4, help="of what is free, for transformers' KV pool")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    made = network("small" if given.small else "8b", "cpu" if given.small else "cuda")
    session = open_session(optc.capture(made), "bf16", given.blocks, given.small)
    running = 8 if given.small else 256
    options = EngineOptions(max_running=running, max_waiting=4096, warm_up=True)
    engine = PagedEngine(session.model, options, DeviceRunner)
    settle()
    seeds = iter(range(10_000))

    def make() -> Work:
        return traffic("fixed", session.vocab_size, next(seeds), given.small)

    def ours() -> float:
        rate: float = serve(engine, make(), Sampling())["output_tokens_per_s"]
        return rate

    contenders: dict[str, Callable[[], float]] = {
        "batches of 8": lambda: naive(made, make, given.naive),
        "continuous": lambda: continuous(made, make, given.memory),
    }
    rates = interleave({"engine": ours, **{name: contenders[name] for name in given.contenders}}, given.rounds)
    result = {
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "engine_over": {name: ratio(rates["engine"], rates[name]) for name in given.contenders},
        "rounds": rates,
        "attention": made.config._attn_implementation,
    }
    print(json.dumps(result), flush=True)
    engine.close()
    session.close()
    if given.small:
        return
    import transformers
    from gpu_timing import card

    record("gpu_transformers", {"card": card(), "transformers": transformers.__version__, **result}, 2)


if __name__ == "__main__":
    main()

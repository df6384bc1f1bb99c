"""Attention of long prompts on one GPU: by cuDNN, and by our kernel over the pool with some tiles.

    python benchmarks/gpu_prefill.py -o prefill.json

One request, causal, 32 query and 8 KV heads of 128 in bfloat16; a layer's whole attention, with rotation and writing. Some
rows of each are compared with float32 products. What cuDNN does is launched one by one, as sessions do it for such calls; where
the host does not say what the call is (`asked`), it asks the device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_attention import FAILURES, HEADS, KV_HEADS, WIDTH, prompt
from gpu_timing import card, time_per_call
from torch import Tensor

from optc.compiler.kernels.cuda.attention.call import Call
from optc.compiler.kernels.cuda.attention.dense import attend_prompt, prompt_tokens, turned_and_written
from optc.compiler.kernels.cuda.attention.launch import PrefillTiles, attend, choose_prefill_tiles
from optc.compiler.kernels.cuda.dispatch import whole_prompt

TILES = [
    PrefillTiles(rows=rows, tile=tile, stages=stages, warps=warps)
    for rows, tile, warps, stages in (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 4, 2),
        (64, 64, 4, 2),
        (64, 128, 4, 2),
    )
]
CHECKED = 16
"""Tokens whose results are compared."""
WRONG = 2e-2
"""As a share of the largest result: bfloat16 weights of probabilities."""
GROUP = HEADS // KV_HEADS


def exact(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, past: int) -> Tensor:
    """[CHECKED, HEADS, WIDTH] of q [N, HEADS, WIDTH] and k, v [past + N, KV_HEADS, WIDTH], all rotated, in float32."""
    rows = q[tokens].float().view(len(tokens), KV_HEADS, GROUP, WIDTH)
    score = torch.einsum("tkgd,skd->tkgs", rows, k.float()) * WIDTH**-0.5
    unseen = torch.arange(k.shape[0], device=k.device) > (tokens + past)[:, None]
    weight = score.masked_fill(unseen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("tkgs,skd->tkgd", weight, v.float()).reshape(len(tokens), HEADS, WIDTH)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())


def rate(tokens: int, past: int, seconds: float) -> dict[str, float]:
    """Counting products of keys that are seen."""
    operations = 4 * HEADS * WIDTH * (tokens * past + tokens**2 / 2)
    return {"microseconds": round(seconds * 1e6, 1), "tflop_s": round(operations / seconds / 1e12, 1)}


def seconds_of(run: Callable[[], Any], rounds: int = 9) -> float:
    """Median of launches one by one, as what reads lengths on the host cannot be captured."""
    times = []
    for turn in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def by_library(call: Call) -> Tensor:
    """A layer's attention as `attend` does it for a long prompt: turned and written, attended by cuDNN."""
    found = attend_prompt(call, least=0)
    assert found is not None
    return found


def library(tokens: int) -> dict[str, Any]:
    """A prompt by cuDNN: the whole of it, how long the first call takes, and its parts."""
    call = prompt(tokens, 0)
    begin = time.perf_counter()
    found = by_library(call)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    picked = torch.randint(tokens, (CHECKED,), device="cuda")
    picked[0], picked[1] = 0, tokens - 1
    table = call.block_tables[0].long()
    k, v = (pool[table].flatten(0, 1)[:tokens] for pool in (call.k_pool, call.v_pool))
    error = distance(found[picked], exact(rotated(call, picked), k, v, picked, 0))
    parts = {"turn_and_write": lambda: turned_and_written(call), "facts": lambda: prompt_tokens(call)}
    with whole_prompt(tokens):  # as sessions say it
        told = rate(tokens, 0, seconds_of(lambda: by_library(call)))
    row = {
        "right": error < WRONG,
        "error": error,
        "first_ms": round(first * 1e3, 1),
        **told,
        "asked": rate(tokens, 0, seconds_of(lambda: by_library(call))),
        **{f"{name}_us": round(seconds_of(run) * 1e6, 1) for name, run in parts.items()},
    }
    print(f"{tokens} by cuDNN", row, flush=True)
    return row


def ours(tokens: int, past: int, tiles: list[PrefillTiles | None]) -> list[dict[str, Any]]:
    """Each of the tiles, fastest first. Keys and values are read back out of the pool, where the kernel has put them."""
    call = prompt(tokens, past)
    table = call.block_tables[0].long()
    rows: list[dict[str, Any]] = []
    picked = torch.randint(tokens, (CHECKED,), device="cuda")
    picked[0], picked[1] = 0, tokens - 1
    expected = None
    for candidate in tiles:
        name = str(candidate or "chosen")
        try:
            found = attend(call, None, candidate or choose_prefill_tiles(call))
            if expected is None:
                k, v = (pool[table].flatten(0, 1)[: tokens + past] for pool in (call.k_pool, call.v_pool))
                expected = exact(rotated(call, picked), k, v, picked, past)
            error = distance(found[picked], expected)
            if not error < WRONG:
                print("WRONG", name, error, flush=True)
                continue
            seconds = time_per_call(
                [functools.partial(attend, call, None, candidate or choose_prefill_tiles(call))] * 2, rounds=5
            )
        except FAILURES as problem:
            print("FAILED", name, repr(problem)[:200], flush=True)
            continue
        rows.append({"tiles": name, "error": error, **rate(tokens, past, seconds)})
        print(f"{tokens} after {past}", rows[-1], flush=True)
    return sorted(rows, key=lambda row: row["microseconds"])


def rotated(call: Any, tokens: Tensor) -> Tensor:
    """Queries as the kernel turns them; rows that nobody asks for are left as they are."""
    turn = call.turn
    angle = turn.position[tokens].float()[:, None] * turn.inv_freq[None]
    cos, sin = (torch.cat([item, item], 1)[:, None].to(call.q.dtype).float() for item in (angle.cos(), angle.sin()))
    q = call.q.clone()
    x = q[tokens].float()
    first, second = x.chunk(2, -1)
    q[tokens] = (x * cos + torch.cat([-second, first], -1) * sin).to(q.dtype)
    return q


def compile_one(tiles: PrefillTiles | None) -> None:
    """Into Triton's cache on disk. What fails is reported where it is timed."""
    with contextlib.suppress(*FAILURES):
        call = prompt(512, 0)
        attend(call, None, tiles or PrefillTiles())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[8192, 4096, 2048])
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_prefill.json"))
    options = parser.parse_args()
    with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, [None, *TILES]))
    result: dict[str, Any] = {**card(), "cudnn": torch.backends.cudnn.version(), "loads": {}}
    for tokens in options.tokens:
        row: dict[str, Any] = {}
        for name, measure in (("by_cudnn", library), ("ours", lambda tokens: ours(tokens, 0, [None, *TILES]))):
            try:
                row[name] = measure(tokens)
            except (*FAILURES, AssertionError) as problem:  # the other is worth knowing
                print("FAILED", tokens, name, repr(problem)[:300], flush=True)
        result["loads"][f"{tokens} tokens"] = row
        options.output.write_text(json.dumps(result, indent=1))
    result["loads"]["2048 tokens after 6144"] = {"ours": ours(2048, 6144, [None, TILES[2], TILES[4]])}
    options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

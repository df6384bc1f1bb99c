"""Attention of long prompts on one GPU: our kernel's tiles, and torch's attention over keys gathered out of the pool.

    python benchmarks/gpu_prefill.py -o prefill.json

One request, causal, 32 query and 8 KV heads of 128 in bfloat16. `ours` is a layer's whole attention (rotation, writing,
attention over the pool), the others attend over dense rotated tensors; what gathering them takes stands beside. Every
candidate's rows are compared with float32 products for a few tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_attention import FAILURES, HEADS, KV_HEADS, WIDTH, prompt
from gpu_timing import card, time_per_call
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from optc.compiler.kernels.cuda.attention.launch import PrefillTiles, attend

TILES = [
    PrefillTiles(rows=rows, tile=tile, stages=stages, warps=warps, bulk=bulk)
    for rows, tile, warps, stages, bulk in (
        *((128, 64, 8, stages, bulk) for stages in (2, 3, 4) for bulk in (False, True)),
        (128, 128, 8, 2, False),
        (128, 128, 8, 3, False),
        (64, 64, 4, 3, False),
        (64, 64, 4, 3, True),
        (64, 128, 4, 2, False),
        (256, 64, 16, 3, False),
        (256, 64, 16, 2, True),
        (256, 64, 16, 3, True),
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


Way = tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]


def dense(tokens: int) -> tuple[list[Tensor], dict[str, Way]]:
    """Queries, keys and values, torch's ways to attend from the beginning of a prompt, and how the result of each becomes
    [tokens, HEADS, WIDTH]."""
    q = torch.randn(tokens, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(KV_HEADS, tokens, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    many = [item[None] for item in (q.transpose(0, 1), k, v)]
    groups = [q.view(tokens, KV_HEADS, GROUP, WIDTH).permute(1, 2, 0, 3)]
    groups += [item[:, None].expand(-1, GROUP, -1, -1) for item in (k, v)]
    starts = torch.tensor([0, tokens], device="cuda", dtype=torch.int32)
    flat = [q, k.transpose(0, 1), v.transpose(0, 1)]

    def heads_of(y: Tensor) -> Tensor:
        return y.reshape(HEADS, tokens, WIDTH).transpose(0, 1)

    def torch_attention(backend: Any, given: list[Tensor], grouped: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(given[0], given[1], given[2], is_causal=True, enable_gqa=grouped)

        return run

    def ragged_cudnn() -> Tensor:
        wide = [flat[0], *(item.repeat_interleave(GROUP, 1) for item in flat[1:])]
        return torch.ops.aten._cudnn_attention_forward(
            *wide, None, starts, starts, tokens, tokens, False, 0.0, True, False, scale=WIDTH**-0.5
        )[0]

    def ragged_flash() -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            *flat, starts, starts, tokens, tokens, 0.0, True, False, scale=WIDTH**-0.5
        )[0]

    found: dict[str, Way] = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        found[f"{name}, grouped"] = (torch_attention(backend, many, True), heads_of)
        found[f"{name}, groups as batches"] = (torch_attention(backend, groups, False), heads_of)
        wide = [many[0], *(item.repeat_interleave(GROUP, 1) for item in many[1:])]
        found[f"{name}, heads copied before"] = (torch_attention(backend, wide, False), heads_of)
    found["cudnn, ragged"] = (ragged_cudnn, lambda y: y.view(tokens, HEADS, WIDTH))
    found["flash, ragged"] = (ragged_flash, lambda y: y.view(tokens, HEADS, WIDTH))
    return flat, found


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
            found = attend(call, None, candidate)
            if expected is None:
                k, v = (pool[table].flatten(0, 1)[: tokens + past] for pool in (call.k_pool, call.v_pool))
                expected = exact(rotated(call, picked), k, v, picked, past)
            error = distance(found[picked], expected)
            if not error < WRONG:
                print("WRONG", name, error, flush=True)
                continue
            seconds = time_per_call([lambda candidate=candidate: attend(call, None, candidate)] * 2, rounds=5)  # type: ignore[misc]
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


def others(tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    inputs, ways = dense(tokens)
    for name, (run, rows_of) in ways.items():
        try:
            picked = torch.randint(tokens, (CHECKED,), device="cuda")
            error = distance(rows_of(run())[picked], exact(inputs[0], inputs[1], inputs[2], picked, 0))
            found[name] = {"error": error, **rate(tokens, 0, time_per_call([run] * 2, rounds=5))}
        except (*FAILURES, TypeError, ValueError) as problem:  # what this torch or card has not
            found[name] = {"failed": repr(problem)[:300]}
        print(tokens, name, found[name], flush=True)
    return found


def gathering(tokens: int) -> dict[str, float]:
    """Microseconds of what attention over dense tensors needs besides: keys and values gathered, queries turned."""
    call = prompt(tokens, 0)
    table = call.block_tables[0]

    def gather() -> list[Tensor]:
        return [pool.permute(2, 0, 1, 3).index_select(1, table) for pool in (call.k_pool, call.v_pool)]

    copy = torch.empty(call.q.shape, device="cuda", dtype=call.q.dtype)
    times: dict[str, Callable[[], Any]] = {"gather": gather, "queries": lambda: copy.copy_(call.q)}
    found = {name: round(time_per_call([run] * 2) * 1e6, 1) for name, run in times.items()}
    print(tokens, found, flush=True)
    return found


def compile_one(tiles: PrefillTiles | None) -> None:
    """Into Triton's cache on disk. What fails is reported where it is timed."""
    with contextlib.suppress(*FAILURES):
        attend(prompt(512, 0), None, tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[8192, 2048])
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_prefill.json"))
    options = parser.parse_args()
    with ProcessPoolExecutor(15, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, [None, *TILES]))
    result: dict[str, Any] = {**card(), "cudnn": torch.backends.cudnn.version(), "loads": {}}
    for tokens in options.tokens:
        load: dict[str, Any] = {"others": others(tokens), "beside": gathering(tokens)}
        load["ours"] = ours(tokens, 0, [None, *TILES])
        result["loads"][f"{tokens} tokens"] = load
        options.output.write_text(json.dumps(result, indent=1))
        torch.cuda.empty_cache()
    best: list[PrefillTiles | None] = [None, *TILES[:8]]
    result["loads"]["2048 tokens after 6144"] = {"ours": ours(2048, 6144, best)}
    options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

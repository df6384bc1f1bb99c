"""Paged decode attention on one GPU: microseconds per layer and share of what its memory can be read at.

    python benchmarks/gpu_attention.py measure            # writes benchmarks/results/gpu_attention.json
    python benchmarks/gpu_attention.py sweep -o sweep.json  # tiles, from which `choose_decode_tiles` is made
    python benchmarks/gpu_attention.py compile            # their kernels, into Triton's cache, in many processes

A call is a layer's whole attention of one step: rotary embedding of q and k, writing k and v, and attention over the
pool, as `optc::rotary_paged_attention_` does it in one launch (32 query and 8 KV heads of 128, bfloat16). Calls rotate
over pools that no cache holds, inside one CUDA graph. Bytes are those of the keys and values that are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import record
from gpu_timing import card, read_ceiling, time_per_call
from triton.errors import TritonError

from optc.compiler.kernels.cuda.attention.call import Call, Turn
from optc.compiler.kernels.cuda.attention.launch import DecodeTiles, PrefillTiles, SplitTiles, attend

HEADS, KV_HEADS, WIDTH = 32, 8, 128
CACHE = 1.2e9
"""Bytes of pools that calls rotate over: many times the card's L2."""


@dataclass(frozen=True)
class Load:
    """A batch. `ragged`: lengths uniform in 1 .. 2 * context - 1; `by_head`: a head's tokens of a block are neighbours
    in the pool, else a token's heads are."""

    batch: int
    context: int
    block: int = 64
    window: int = 0
    ragged: bool = False
    by_head: bool = True

    @property
    def name(self) -> str:
        parts = [f"{self.batch} x {self.context}", f"block {self.block}"]
        parts += [f"window {self.window}"] * bool(self.window) + ["ragged"] * self.ragged
        return ", ".join(parts + ["by token"] * (not self.by_head))

    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.context] * self.batch
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, 2 * self.context, (self.batch,), generator=generator).tolist()

    @property
    def bytes(self) -> int:
        """Keys and values of earlier tokens in bfloat16."""
        seen = [min(length - 1, self.window - 1 if self.window else length) for length in self.lengths()]
        return sum(seen) * KV_HEADS * WIDTH * 2 * 2

    def calls(self, copies: int | None = None) -> list[Call]:
        """One call per pool, over as many pools as `CACHE` asks for."""
        lengths = self.lengths()
        columns = -(-max(lengths) // self.block)
        copies = copies or min(400, max(2, int(CACHE / self.bytes) + 1))
        return [self._call(lengths, columns) for _ in range(copies)]

    def _call(self, lengths: Sequence[int], columns: int) -> Call:
        # Blocks that left the window are given back: their columns hold any number.
        kept = min(columns, self.window // self.block + 1 if self.window else columns)
        blocks = self.batch * kept
        shape = (blocks, KV_HEADS, self.block, WIDTH) if self.by_head else (blocks, self.block, KV_HEADS, WIDTH)
        pools = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        pools = [pool.transpose(1, 2) for pool in pools] if self.by_head else pools
        product = torch.randn(self.batch, HEADS + 2 * KV_HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
        tables = torch.randperm(blocks, device="cuda").int().view(self.batch, kept)
        tables = torch.cat([tables.new_zeros(self.batch, columns - kept), tables], 1)
        last = torch.tensor(lengths, device="cuda") - 1
        block = tables.gather(1, (last // self.block)[:, None])[:, 0].long()
        inv_freq = 500000.0 ** (-torch.arange(0, WIDTH, 2, device="cuda") / WIDTH)
        q, k, v = product.split([HEADS, KV_HEADS, KV_HEADS], 1)
        return Call(
            q=q,
            k=k,
            v=v,
            k_pool=pools[0],
            v_pool=pools[1],
            slot_mapping=block * self.block + last % self.block,
            block_tables=tables,
            context_lens=(last + 1).int(),
            cu_seqlens=torch.arange(self.batch + 1, device="cuda", dtype=torch.int32),
            scale=WIDTH**-0.5,
            window=self.window,
            softcap=0.0,
            turn=Turn(
                position=last, inv_freq=inv_freq, q_norm=None, k_norm=None, scaling=1.0, interleaved=False, eps=0.0
            ),
        )


MEASURED = [
    *(Load(1, context) for context in (128, 1024, 4096)),
    *(Load(64, context) for context in (128, 1024, 4096)),
    *(Load(256, context) for context in (128, 192, 512)),
    Load(64, 1024, block=16),
    Load(256, 512, block=16),
    Load(64, 1024, by_head=False),
    Load(64, 1024, ragged=True),
    Load(64, 1024, block=16, ragged=True),
    Load(256, 512, ragged=True),
    *(Load(8, 4096 * 2**power, window=4096) for power in range(6)),
]
SWEPT = [
    Load(1, 128),
    Load(1, 4096),
    Load(4, 1024),
    Load(8, 4096),
    Load(8, 1024, ragged=True),
    Load(16, 1024),
    Load(64, 1024),
    Load(256, 192),
    Load(256, 512),
    Load(64, 1024, ragged=True),
]


FEW: list[DecodeTiles | SplitTiles] = [
    *(
        SplitTiles(tile=tile, stages=stages, warps=warps, programs=programs, registers=registers)
        for tile, stages, warps, programs, registers in (
            (64, 3, 8, 1, 255),
            (64, 3, 8, 2, 128),
            (64, 3, 4, 4, 128),
            (64, 5, 4, 3, 168),
            (128, 3, 8, 1, 255),
            (128, 3, 8, 2, 128),
            (32, 5, 4, 4, 128),
        )
    ),
    DecodeTiles(),
]
MANY: list[DecodeTiles | SplitTiles] = [
    SplitTiles(warps=2, programs=4, registers=255, most=1),
    SplitTiles(tile=32, stages=5, warps=2, programs=6, registers=168, most=1),
    *(
        DecodeTiles(tile=tile, stages=stages, programs=programs, registers=registers, start=start)
        for tile, stages, programs, registers, start in (
            (32, 5, 4, 128, 4),
            (32, 5, 4, 128, 2),
            (64, 3, 3, 168, 2),
            (64, 5, 3, 168, 2),
            (64, 5, 2, 255, 2),
        )
    ),
]


def candidates(load: Load) -> list[DecodeTiles | SplitTiles]:
    """For a few (request, KV head) pairs, what a beginning and the merging cost counts; for many, the flow."""
    return FEW if load.batch <= 16 else MANY


FAILURES = (RuntimeError, TritonError)
"""What a candidate that asks for too much raises: the next one may run."""


def time_of(calls: Sequence[Call], tiles: DecodeTiles | SplitTiles | None = None) -> float:
    """Seconds of one call."""
    return time_per_call([lambda call=call: attend(call, tiles) for call in calls])  # type: ignore[misc]


def _figure(load: Load, seconds: float, ceiling: float) -> dict[str, Any]:
    share = load.bytes / seconds / ceiling
    print(f"{load.name:40} {seconds * 1e6:8.2f} us  {100 * share:5.1f} %", flush=True)
    return {"microseconds": round(seconds * 1e6, 2), "share_of_ceiling": round(share, 4)}


def measure(options: argparse.Namespace) -> None:
    ceiling = read_ceiling()
    print(f"{card()['gpu']}: read ceiling {ceiling / 1e12:.3f} TB/s", flush=True)
    figures: dict[str, Any] = {}
    for load in MEASURED:
        figures[load.name] = _figure(load, time_of(load.calls()), ceiling)
        torch.cuda.empty_cache()
    prefill = {
        f"{tokens} tokens after {past}": _prefill(tokens, past=past)
        for tokens, past in ((512, 0), (1024, 0), (8192, 0), (2048, 6144))
    }
    windows = [figures[load.name]["microseconds"] for load in MEASURED if load.window]
    slope = round(windows[-1] / windows[1], 4)
    print(f"window 4096, context 131072 over 8192: {slope}", flush=True)
    result = {
        **card(),
        "read_ceiling_tb_s": round(ceiling / 1e12, 3),
        "decode": figures,
        "prefill": prefill,
        "window_slope": slope,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1))
    else:
        record("gpu_attention", result, threads=0)


def prompt(tokens: int, past: int) -> Call:
    """A prompt of one request, or its next chunk."""
    load = Load(1, tokens + past)
    call = load._call([tokens + past], -(-(tokens + past) // load.block))
    product = torch.randn(tokens, HEADS + 2 * KV_HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
    q, k, v = product.split([HEADS, KV_HEADS, KV_HEADS], 1)
    position = torch.arange(past, past + tokens, device="cuda")
    assert call.turn is not None
    return dataclasses.replace(
        call,
        q=q,
        k=k,
        v=v,
        turn=dataclasses.replace(call.turn, position=position),
        slot_mapping=call.block_tables[0, position // load.block].long() * load.block + position % load.block,
        cu_seqlens=torch.tensor([0, tokens], device="cuda", dtype=torch.int32),
    )


def _prefill(tokens: int, tiles: PrefillTiles | None = None, *, past: int = 0) -> dict[str, float]:
    """Of a prompt, causal."""
    call = prompt(tokens, past)
    seconds = time_per_call([lambda: attend(call, None, tiles)] * 3)
    rate = 4 * HEADS * WIDTH * (tokens * past + tokens**2 / 2) / seconds
    print(f"prefill {tokens} after {past} {tiles or ''}: {seconds * 1e6:.0f} us, {rate / 1e12:.0f} TFLOP/s", flush=True)
    return {"microseconds": round(seconds * 1e6, 1), "tflop_s": round(rate / 1e12, 1)}


def _compile(job: tuple[Load, DecodeTiles | SplitTiles | None]) -> str | None:
    """Into Triton's cache on disk, from a process of its own."""
    load, tiles = job
    try:
        attend(dataclasses.replace(load, context=load.block, ragged=False).calls(1)[0], tiles)
        torch.cuda.synchronize()
    except FAILURES as error:
        return f"{load.name} {tiles}: {error!r:.200}"
    return None


def compile_all(options: argparse.Namespace) -> None:
    """What `sweep` and `measure` will run, in several processes."""
    kinds = {(load.batch, load.block, load.window): load for load in MEASURED + SWEPT}
    jobs: list[tuple[Load, DecodeTiles | SplitTiles | None]] = [
        (load, tiles) for load in kinds.values() for tiles in candidates(load) if load in SWEPT
    ]
    jobs += [(load, None) for load in kinds.values() if load not in SWEPT]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for failure in filter(None, pool.map(_compile, jobs)):
            print("failed:", failure, flush=True)


def sweep(options: argparse.Namespace) -> None:
    ceiling = read_ceiling()
    print(f"{card()['gpu']}: read ceiling {ceiling / 1e12:.3f} TB/s", flush=True)
    found: dict[str, Any] = {}
    for load in SWEPT:
        calls = load.calls()
        rows = []
        for candidate in candidates(load):
            try:
                rows.append((time_of(calls, candidate), tuple(dataclasses.asdict(candidate).values())))
            except FAILURES as error:  # the next candidate may run
                print("failed:", load.name, candidate, repr(error)[:200], flush=True)
        rows.sort()
        print(f"{load.name}, limit {load.bytes / ceiling * 1e6:.1f} us (tile, stages, warps, programs, registers)")
        for seconds, tiles_row in rows[:12]:
            print(f"  {seconds * 1e6:8.2f} us {100 * load.bytes / seconds / ceiling:5.1f} % {tiles_row}", flush=True)
        found[load.name] = [{"microseconds": round(s * 1e6, 2), "tiles": row} for s, row in rows]
        del calls
        torch.cuda.empty_cache()
    if options.output:
        options.output.write_text(json.dumps({**card(), "read_ceiling_tb_s": ceiling / 1e12, "sweep": found}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "measure", "sweep"))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--processes", type=int, default=12)
    options = parser.parse_args()
    {"compile": compile_all, "measure": measure, "sweep": sweep}[options.what](options)


if __name__ == "__main__":
    main()

"""Launches of paged attention: which kernels for a call, with which tiles, over which scratch memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from optc.compiler.kernels.cuda.attention.call import Call, Turn, factors, padded, turning, widths
from optc.compiler.kernels.cuda.attention.decode import decode
from optc.compiler.kernels.cuda.attention.dense import attend_prompt
from optc.compiler.kernels.cuda.attention.prefill import prefill
from optc.compiler.kernels.cuda.attention.split import decode_split
from optc.compiler.kernels.cuda.attention.write import write
from optc.compiler.kernels.cuda.dispatch import dependent_launch, scratch
from optc.compiler.kernels.cuda.paged_attention import SHORT_CONTEXT

FEW_PAIRS, FEWEST_PAIRS = 256, 32
"""Pairs of a request and a KV head below which each is divided; up to which a step's latency is one pair's."""
FEWEST_ROWS = 16
"""Rows of the smallest product of tensor cores."""
MANY_ROWS = 4096
"""Rows of a request from which on large tiles are full nearly always."""


@dataclass(frozen=True, kw_only=True)
class DecodeTiles:
    """How `decode` runs.

    Attributes:
        tile: keys at a time.
        stages: of the pipeline; a tile's block is looked up in one and its keys are loaded in another, so that there
            are (stages - 1) // 2 tiles on their way into shared memory.
        warps: of a program.
        programs: that a multiprocessor has at a time; how many there are in all, see `count_programs`.
        registers: of a thread, so that as many programs fit.
        start: what the beginning of a (request, KV head) pair costs, in tiles.
        merged: parts of a pair that are merged at a time.
    """

    tile: int = 32
    stages: int = 5
    warps: int = 4
    programs: int = 4
    registers: int = 128
    start: int = 4
    merged: int = 4


@dataclass(frozen=True, kw_only=True)
class SplitTiles:
    """How `decode_split` runs; see `DecodeTiles`.

    Attributes:
        programs: that a multiprocessor should have, by which the line of tiles is divided.
        fewest: tiles of a program, so that short contexts are not merged.
        most: parts of a pair; 0: as many as programs allow.
        early: the next kernel may start at once; else when the first loads are under way.
    """

    tile: int = 64
    stages: int = 3
    warps: int = 8
    programs: int = 2
    registers: int = 128
    fewest: int = 1
    most: int = 0
    merged: int = 16
    early: bool = True


@dataclass(frozen=True, kw_only=True)
class PrefillTiles:
    """How `prefill` runs.

    Attributes:
        rows: of queries, tokens times heads of a group. tile: keys at a time. stages: of the pipeline. warps: of a program.
    """

    rows: int = 128
    tile: int = 64
    stages: int = 2
    warps: int = 8


def attend(
    call: Call, decode_tiles: DecodeTiles | SplitTiles | None = None, prefill_tiles: PrefillTiles | None = None
) -> Tensor:
    """Write the new keys and values and attend: with one token per request in one launch, else in three.

    More requests than tokens mean that no request has several, and that some may share blocks: the tokens of one that are
    requests of their own see each other's keys, so all are written before. That is two launches where requests are few.

    Shapes alone decide, never lengths, so that a captured CUDA graph serves any lengths; but for calls that are too large to be
    captured, see `attend_prompt`.
    """
    tokens, requests = call.q.shape[0], call.block_tables.shape[0]
    heads, value_width = call.q.shape[1], call.v.shape[2]
    out = torch.empty((tokens, heads, value_width), dtype=call.v.dtype, device=call.v.device)
    if tokens == 0:
        return out
    tiles = decode_tiles or choose_decode_tiles(call)
    if tokens != requests:
        whole = attend_prompt(call) if prefill_tiles is None else None
        if whole is not None:
            return whole
        write_new(call)
        if tokens > requests or isinstance(tiles, DecodeTiles):
            _prefill(call, out, prefill_tiles or choose_prefill_tiles(call))
    if isinstance(tiles, SplitTiles):
        _split(call, out, tiles)
    else:
        _decode(call, out, tiles)
    return out


def choose_decode_tiles(call: Call) -> DecodeTiles | SplitTiles:
    """As measured on an H200 (benchmarks/gpu_attention.py, gpu_step.py); wider heads by what fits into registers.

    Where pairs of a request and a KV head are few, each is shared by many programs, and a step's latency is that of
    some tiles and of merging; where they are many, what counts is how much is under way. Many short ones, by the width
    of their tables, have a program each; where they may be long, they share a line, since one of them alone would be
    waited for. Beside requests of several tokens the line of `decode` serves those that have one.
    """
    size = _head_bytes(call)
    pairs = call.block_tables.shape[0] * call.k.shape[1]
    alone = call.q.shape[0] <= call.block_tables.shape[0]
    if alone and pairs >= FEW_PAIRS and size <= 256 and longest(call) <= SHORT_CONTEXT:
        return SplitTiles(warps=2, programs=4, registers=255, most=1)
    if alone and pairs < FEW_PAIRS:
        if size > 256:
            return SplitTiles(tile=16 if size > 512 else 32, programs=1, registers=255)
        if pairs <= FEWEST_PAIRS:
            return SplitTiles(programs=1, registers=255, early=False)
        return SplitTiles(stages=5, warps=4, programs=3, registers=168)
    if size > 512:
        return DecodeTiles(tile=16, programs=1, registers=255)
    if size > 256:
        return DecodeTiles(tile=32, programs=2, registers=255, start=2)
    return DecodeTiles()


def count_programs(call: Call, tiles: DecodeTiles) -> int:
    """As many per (request, KV head) pair as run at a time, one at least, and no more than a full table has tiles.

    A whole number of them: pairs of equal length are then cut alike, or not at all, and nothing is merged. More than
    run at a time is no loss: while the last ones end, those of the next kernel begin.
    """
    pairs = call.block_tables.shape[0] * call.k.shape[1]
    at_a_time = multiprocessors(call.q.device) * tiles.programs // pairs
    return pairs * max(1, min(at_a_time, triton.cdiv(longest(call), tiles.tile) + tiles.start))


def longest(call: Call) -> int:
    """Tokens that a request can have at most, by the width of the block tables."""
    return call.block_tables.shape[1] * call.k_pool.shape[1]


def choose_prefill_tiles(call: Call) -> PrefillTiles:
    """By rows that a request has on average, and what fits into registers (float32 products have no tensor cores)."""
    size = _head_bytes(call)
    rows = call.q.shape[0] * (call.q.shape[1] // call.k.shape[1]) // call.block_tables.shape[0]
    if call.q.element_size() == 4:
        return PrefillTiles(rows=16, tile=32 if size <= 512 else 16, warps=4)
    if rows <= FEWEST_ROWS:
        return PrefillTiles(rows=16, tile=64, warps=4)
    if rows >= MANY_ROWS and size <= 256:
        return PrefillTiles(rows=128, tile=128 if dependent_launch(call.q.device) else 64)
    return PrefillTiles(rows=64, tile=64, warps=4) if size <= 256 else PrefillTiles(rows=64, tile=32, warps=8)


def _head_bytes(call: Call) -> int:
    return max(padded(call.q.shape[2]), padded(call.v.shape[2])) * call.q.element_size()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; in Triton's interpreter a few, so that programs share work there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@scratch
def _scratch(device: torch.device, parts: int, rows: int, width: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Partial results, their statistics, and arrivals."""
    results = torch.empty(parts, rows, width, device=device)
    statistics = torch.empty(parts, rows, 2, device=device)
    return results, statistics, torch.zeros(pairs, dtype=torch.int32, device=device)


def _decode(call: Call, out: Tensor, tiles: DecodeTiles) -> None:
    requests, programs = call.block_tables.shape[0], count_programs(call, tiles)
    args, constants = _of_both(call, out, tiles, count=requests, parts=2 * programs)
    decode[(programs,)](*args, ALONE=call.q.shape[0] == requests, START=tiles.start, **constants)


def _split(call: Call, out: Tensor, tiles: SplitTiles) -> None:
    requests, heads = call.block_tables.shape[0], call.k.shape[1]
    at_a_time = multiprocessors(call.q.device) * tiles.programs
    shares = triton.cdiv(longest(call), tiles.tile * tiles.fewest)
    splits = max(1, min(at_a_time // heads, shares, tiles.most or shares))
    args, constants = _of_both(call, out, tiles, count=at_a_time, parts=requests * heads * splits)
    tokens = call.q.shape[0]
    if tokens != requests:  # keys of this call are loaded before the wait for the kernel in front, which writes them
        constants["launch_pdl"] = False
    decode_split[(splits, heads, tokens)](*args, FEWEST=tiles.fewest, EARLY=tiles.early, **constants)


def _of_both(
    call: Call, out: Tensor, tiles: DecodeTiles | SplitTiles, *, count: int, parts: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `decode` and `decode_split` are launched with alike: arguments in their order, constants and options.

    Args:
        count: the whole number behind the strides, which is another one in each.
        parts: of pairs, that may be left to be merged.
    """
    requests, heads = call.block_tables.shape[0], call.k.shape[1]
    group, device = call.q.shape[1] // heads, call.q.device
    group_rows = triton.next_power_of_2(group)
    constants = widths(call)
    turn, turned = turning(call)
    pdl = dependent_launch(device)
    args = (
        call.q, call.k, call.v, call.k_pool, call.v_pool, call.slot_mapping, call.block_tables, call.context_lens,
        call.cu_seqlens, turn.position, turn.inv_freq, turn.q_norm, turn.k_norm, out,
        *_scratch(device, parts, group_rows, constants["VALUE_WIDTH"], requests * heads),
        *call.q.stride()[:2], *call.k.stride()[:2], *call.v.stride()[:2],
        *call.k_pool.stride()[:3], *call.v_pool.stride()[:3], call.block_tables.stride(0),
        count, *factors(call), turn.scaling, turn.eps,
    )  # fmt: skip
    shared = {
        "REQUESTS": triton.next_power_of_2(requests), "GROUP": group, "ROWS": max(FEWEST_ROWS, group_rows),
        "GROUP_ROWS": group_rows, "WINDOW": call.window, "SOFTCAP": bool(call.softcap),
        "TILE": tiles.tile, "STAGES": tiles.stages, "MERGED": tiles.merged, "PDL": pdl,
        "num_warps": tiles.warps, "maxnreg": tiles.registers, "launch_pdl": pdl,
    }  # fmt: skip
    return args, {**constants, **turned, **shared}


def write_new(call: Call) -> None:
    """New keys and values into the pools."""
    constants = widths(call)
    turn, turned = turning(call)
    pdl = dependent_launch(call.q.device)
    write[(call.k.shape[0],)](
        call.k, call.v, call.k_pool, call.v_pool, call.slot_mapping, turn.position, turn.inv_freq, turn.k_norm,
        *call.k.stride()[:2], *call.v.stride()[:2], *call.k_pool.stride()[:3], *call.v_pool.stride()[:3],
        turn.scaling, turn.eps,
        HEAD_ROWS=triton.next_power_of_2(call.k.shape[1]), PDL=pdl, **constants, **turned,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


def _prefill(call: Call, out: Tensor, tiles: PrefillTiles) -> None:
    requests, heads = call.block_tables.shape[0], call.k.shape[1]
    group = call.q.shape[1] // heads
    rows = max(tiles.rows, triton.next_power_of_2(group))
    tokens = rows // group
    turn, turned = turning(call)
    pdl = dependent_launch(call.q.device)
    # Every request but the full ones leaves one tile that is not full, and no request of one token has any.
    grid = (min(call.q.shape[0] // tokens + requests, call.q.shape[0]), heads)
    prefill[grid](
        call.q, call.k_pool, call.v_pool, call.slot_mapping, call.block_tables, call.context_lens, call.cu_seqlens,
        turn.position, turn.inv_freq, turn.q_norm, out,
        *call.q.stride()[:2], *call.k_pool.stride()[:3], *call.v_pool.stride()[:3], call.block_tables.stride(0),
        requests, *factors(call), turn.scaling, turn.eps,
        REQUESTS=triton.next_power_of_2(requests), GROUP=group, ROWS=rows, TOKENS=tokens,
        WINDOW=call.window, SOFTCAP=bool(call.softcap), TILE=tiles.tile, STAGES=tiles.stages, PDL=pdl,
        **widths(call), **turned, num_warps=tiles.warps, launch_pdl=pdl,
    )  # fmt: skip


def paged_attention_(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor, block_tables: Tensor,
    context_lens: Tensor, cu_seqlens: Tensor, *, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """The op on CUDA."""
    call = Call(
        q=_rows(q), k=_rows(k), v=_rows(v), k_pool=k_pool, v_pool=v_pool, slot_mapping=slot_mapping,
        block_tables=block_tables, context_lens=context_lens, cu_seqlens=cu_seqlens,
        scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    return attend(call)


def rotary_paged_attention_(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor, block_tables: Tensor,
    context_lens: Tensor, cu_seqlens: Tensor, position: Tensor, inv_freq: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, *, scaling: float, interleaved: bool, eps: float, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """The op on CUDA."""
    turn = Turn(
        position=position, inv_freq=inv_freq, q_norm=q_norm, k_norm=k_norm,
        scaling=scaling, interleaved=interleaved, eps=eps,
    )  # fmt: skip
    call = Call(
        q=_rows(q), k=_rows(k), v=_rows(v), k_pool=k_pool, v_pool=v_pool, slot_mapping=slot_mapping,
        block_tables=block_tables, context_lens=context_lens, cu_seqlens=cu_seqlens,
        scale=scale, window=window, softcap=softcap, turn=turn,
    )  # fmt: skip
    return attend(call)


def _rows(heads: Tensor) -> Tensor:
    """[N, H, D] with its last axis contiguous."""
    return heads if heads.stride(2) == 1 else heads.contiguous()

"""The Triton kernels of paged attention against the references, in the interpreter or on the GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import bounds
import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU, ON_GPU
from paged_cases import Case
from torch import Tensor

from optc.compiler.kernels.cuda.attention.call import Call, Turn
from optc.compiler.kernels.cuda.attention.launch import (
    DecodeTiles,
    PrefillTiles,
    SplitTiles,
    attend,
    choose_decode_tiles,
)
from optc.compiler.kernels.cuda.paged_attention import (
    PAGED_ATTENTION,
    ROTARY_PAGED_ATTENTION,
    accepts,
    accepts_rotary,
)
from optc.compiler.ops.dialect.paged import PADDING
from optc.compiler.ops.library import reference

NAMES = ("q", "k", "v", "k_pool", "v_pool", "slot_mapping", "block_tables", "context_lens", "cu_seqlens")
DECODE = {"new": (1, 1, 1, 1), "past": (0, 21, 16, 70), "block_size": 16}
MIXED = {"new": (1, 11, 1, 3), "past": (40, 0, 3, 30), "block_size": 4}
CASES = {
    "decode": Case(**DECODE),
    "decode, tile of several blocks": Case(**DECODE | {"block_size": 4}),
    "decode, block of several tiles": Case(**DECODE | {"block_size": 64}),
    "decode, window 1": Case(**DECODE, window=1),
    "decode, window": Case(**DECODE, window=20),
    "decode, softcap": Case(**DECODE, softcap=5.0),
    "decode, one head per group": Case(**DECODE, heads=2),
    "decode, seven heads per group": Case(**DECODE, heads=7, kv_heads=1),
    "decode, odd widths": Case(**DECODE, width=20, value_width=12),
    "decode, one request": Case(new=(1,), past=(150,), block_size=16),
    "mixed": Case(**MIXED),
    "mixed, window and softcap": Case(**MIXED, window=9, softcap=5.0),
    "mixed, three heads per group": Case(**MIXED, heads=6, width=24),
    "prefill": Case(new=(30,), past=(0,), block_size=16),
}
LARGE = {
    f"{kind}, {width} wide, block {block}, {dtype}": Case(
        **shape, width=width, value_width=width, heads=heads, kv_heads=heads // group, block_size=block, dtype=dtype
    )
    for kind, shape in (
        ("decode", {"new": (1,) * 6, "past": (0, 1, 63, 64, 1000, 3333)}),
        ("mixed", {"new": (1, 300, 1, 5, 130), "past": (700, 0, 3, 64, 500)}),
    )
    for width, heads, group, block, dtype in (
        (32, 6, 3, 64, torch.bfloat16),
        (64, 8, 4, 16, torch.bfloat16),
        (64, 8, 2, 16, torch.float32),
        (80, 4, 1, 32, torch.bfloat16),
        (96, 8, 8, 64, torch.float16),
        (128, 8, 4, 64, torch.bfloat16),
        (128, 8, 4, 16, torch.float16),
        (128, 4, 2, 32, torch.float32),
        (256, 4, 2, 16, torch.bfloat16),
    )
}
SMALL_PREFILL = PrefillTiles(rows=16, tile=16, stages=2, warps=4)
SMALL_TILES = DecodeTiles(tile=16, stages=2, programs=2), SMALL_PREFILL
SMALL_SPLIT = SplitTiles(tile=16, stages=2, warps=4, programs=9, merged=2), SMALL_PREFILL
DECODES = pytest.mark.parametrize("tiles", [SMALL_TILES, SMALL_SPLIT], ids=["line", "split"])
"""One token per request by either kernel; several take `decode` in both."""


def turns(case: Case, rotated: int, norm: bool) -> tuple[Any, ...]:
    """Positions of all tokens, frequencies and weights of norms."""
    generator = torch.Generator().manual_seed(2)
    position = torch.cat([torch.arange(n) + past for n, past in zip(case.new, case.past, strict=True)])
    inv_freq = 10000.0 ** (-torch.arange(rotated // 2) / (rotated // 2))
    weights = [(torch.rand(case.width, generator=generator) + 0.5).to(case.dtype) if norm else None for _ in "qk"]
    return (position, inv_freq, *weights)


def check(
    case: Case,
    turn: tuple[Any, ...] | None = None,
    padding: tuple[int, ...] = (),
    tiles: tuple[Any, Any] = (None, None),
    *,
    strided: bool = False,
    interleaved: bool = False,
) -> None:
    """Output and pools against the reference in float64. In 16 bits, the output may be as far off as the reference in
    16 bits is, times the margin."""
    inputs, knobs = case.inputs()
    name, extra = "paged_attention_", {}
    if turn is not None:
        name, extra = "rotary_paged_attention_", {"scaling": 1.25, "interleaved": interleaved, "eps": 1e-5}
    inputs[5][list(padding)] = PADDING
    here = [item.clone().to(DEVICE) for item in inputs]
    if strided:  # [blocks, heads, tokens, width] in memory; queries, keys and values are slices of one product
        here[3:5] = [pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in here[3:5]]
        here[:3] = list(torch.cat(here[:3], 1).split([item.shape[1] for item in here[:3]], 1))
    if case.window:  # blocks that left the window are given back
        for request, past in enumerate(case.past):
            here[6][request, : max(past + 1 - case.window, 0) // case.block_size] = 1 << 20
    moved = tuple(item.to(DEVICE) if isinstance(item, Tensor) else item for item in turn or ())
    with_turn = None if turn is None else Turn(**dict(zip(("position", "inv_freq", "q_norm", "k_norm"), moved, strict=True)), **extra)  # fmt: skip
    found = attend(Call(**dict(zip(NAMES, here, strict=True)), **knobs, turn=with_turn), *tiles)  # type: ignore[arg-type]

    inputs[6].clamp_(min=0)  # the reference reads the whole table before it cuts it

    def wide(items: Any, dtype: torch.dtype) -> list[Any]:
        return [item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item for item in items]

    exact, same = wide(inputs, torch.float64), [item.clone() for item in inputs]
    expected = reference(name)(*exact, *wide(turn or (), torch.float64), **extra, **knobs)
    rounded = reference(name)(*same, *(turn or ()), **extra, **knobs)
    largest = float(expected.abs().max())
    once = 0.0 if case.dtype is torch.float32 else float((rounded.double() - expected).abs().max())
    allowed = max((ROTARY_PAGED_ATTENTION if turn else PAGED_ATTENTION).tolerance * largest, bounds.MARGIN * once)
    assert found.dtype is case.dtype
    assert float((found.cpu().double() - expected).abs().max()) <= allowed
    step = max(1e-6, 2 * torch.finfo(case.dtype).eps) if turn else 0.0
    for pool, wanted in zip(here[3:5], same[3:5], strict=True):
        torch.testing.assert_close(pool.cpu(), wanted, rtol=step, atol=step, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, dtype: torch.dtype) -> None:
    check(_in(CASES[name], dtype), tiles=SMALL_TILES)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if set(case.new) == {1}])
def test_split_equals_reference(name: str, dtype: torch.dtype) -> None:
    check(_in(CASES[name], dtype), tiles=SMALL_SPLIT)


def _in(case: Case, dtype: torch.dtype) -> Case:
    return Case(**{**case.__dict__, "dtype": dtype})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "rotated", "norm", "interleaved", "tiles"),
    [
        (DECODE, 16, False, False, SMALL_TILES),
        (DECODE, 8, True, False, SMALL_TILES),
        (DECODE, 12, False, True, SMALL_TILES),
        (DECODE, 16, False, False, SMALL_SPLIT),
        (DECODE, 8, True, False, SMALL_SPLIT),
        (DECODE, 12, False, True, SMALL_SPLIT),
        (MIXED, 16, True, True, SMALL_TILES),
        (MIXED, 8, False, False, SMALL_TILES),
    ],
)
def test_norms_and_rotary(
    shape: dict[str, Any], rotated: int, norm: bool, interleaved: bool, tiles: Any, dtype: torch.dtype
) -> None:
    case = Case(**shape, dtype=dtype)
    check(case, turns(case, rotated, norm), tiles=tiles, strided=True, interleaved=interleaved)


@pytest.mark.parametrize(
    ("shape", "padding"), [(DECODE, (0,)), (DECODE, (1, 2, 3)), (MIXED, (0, 3, 12, 13, 14, 15)), (MIXED, (15,))]
)
def test_padding_leaves_no_trace(shape: dict[str, Any], padding: tuple[int, ...]) -> None:
    check(Case(**shape), padding=padding, tiles=SMALL_TILES)
    if shape is DECODE:
        check(Case(**shape), padding=padding, tiles=SMALL_SPLIT)


def test_programs_share_the_line_of_tiles() -> None:
    """Few and many programs: pairs that are cut anywhere give the same."""
    for programs, start in ((1, 0), (2, 2), (5, 1)):
        tiles = DecodeTiles(tile=16, stages=3, programs=programs, start=start, merged=2)
        check(Case(new=(1, 1), past=(3, 70), block_size=16), tiles=(tiles, None))


def test_parts_of_a_pair_are_merged() -> None:
    """One program for a pair, a few, and more than there are tiles; parts merged in one round and in several; no more
    parts than are allowed."""
    for programs, fewest, merged, most in (
        (1, 1, 4, 0),
        (3, 2, 2, 0),
        (9, 3, 1, 0),
        (30, 1, 8, 0),
        (9, 1, 2, 1),
        (9, 1, 2, 2),
    ):
        tiles = SplitTiles(tile=16, stages=2, warps=4, programs=programs, fewest=fewest, merged=merged, most=most)
        check(Case(new=(1, 1), past=(3, 70), block_size=16), tiles=(tiles, None))


def test_many_short_requests_have_a_program_each() -> None:
    """By the width of the tables: where a request may be long, all share its work."""
    inputs, knobs = Case(new=(1,) * 128, past=(3,) * 128, heads=4, kv_heads=2, width=64, block_size=64).inputs()
    call = Call(**dict(zip(NAMES, inputs, strict=True)), **knobs)  # type: ignore[arg-type]
    for columns, most in ((1, 1), (16, 1), (17, None)):
        tables = call.block_tables[:, :1].expand(-1, columns)
        chosen = choose_decode_tiles(dataclasses.replace(call, block_tables=tables))
        assert (chosen.most if isinstance(chosen, SplitTiles) else None) == most


@DECODES
def test_other_counts_than_one_are_not_computed_wrongly(tiles: Any) -> None:
    """As many tokens as requests means one each; rows that break it are NaN."""
    inputs, knobs = Case(**DECODE).inputs()
    for starts, wrong in (([0, 1, 3, 3, 4], [1, 2]), ([0, 2, 3, 4, 4], [0, 1, 2, 3])):
        inputs[8] = torch.tensor(starts, dtype=torch.int32)
        tensors = dict(zip(NAMES, [item.to(DEVICE) for item in inputs], strict=True))
        found = attend(Call(**tensors, **knobs), *tiles)  # type: ignore[arg-type]
        assert found.isnan().flatten(1).all(1).nonzero().flatten().tolist() == wrong


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tiles", [(None, None), SMALL_TILES, SMALL_SPLIT], ids=["chosen", "line", "split"])
def test_tokens_that_are_requests_of_their_own_see_each_other(tiles: Any, dtype: torch.dtype) -> None:
    """As drafted tokens are laid out: blocks and lengths of each, one request to spare, and padding."""
    case = Case(new=(3, 1, 5, 2), past=(14, 0, 40, 3), block_size=16, dtype=dtype)
    inputs, knobs = case.inputs()
    expected = reference("paged_attention_")(
        *[item.double() if item.is_floating_point() else item for item in inputs], **knobs
    )
    new = torch.tensor(case.new)
    owner = torch.arange(len(new)).repeat_interleave(new)
    behind = torch.arange(len(owner)) - (new.cumsum(0) - new)[owner]
    inputs, _ = case.inputs()
    inputs[5][-1], expected[-1] = PADDING, 0.0
    inputs[6] = torch.cat((inputs[6][owner], inputs[6][:1]))
    inputs[7] = torch.cat(((torch.tensor(case.past)[owner] + behind + 1).int(), torch.zeros(1, dtype=torch.int32)))
    inputs[8] = torch.tensor([*range(len(owner) + 1), len(owner)], dtype=torch.int32)
    tensors = dict(zip(NAMES, [item.to(DEVICE) for item in inputs], strict=True))
    found = attend(Call(**tensors, **knobs), *tiles)  # type: ignore[arg-type]
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert float((found.cpu().double() - expected).abs().max()) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", LARGE)
def test_real_sizes(name: str) -> None:
    """With the tiles that the launcher chooses."""
    case = LARGE[name]
    check(case)
    check(case, turns(case, case.width // 2, norm=True), strided=True)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=ON_GPU) for dtype in (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("window", [0, 100])
def test_long_prompts(dtype: torch.dtype, window: int) -> None:
    """Beside short ones, a later chunk of one and decode."""
    shape: dict[str, Any] = {"new": (1, 1100, 1200, 30), "past": (700, 0, 50, 0), "width": 128, "value_width": 128}
    case = Case(**shape, heads=4, kv_heads=2, block_size=64, dtype=dtype, window=window)
    check(case)
    check(case, turns(case, 64, norm=True), strided=True)


@pytest.mark.keeps_memory
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=ON_GPU)])
def test_ops_run_the_kernels(dtype: torch.dtype) -> None:
    """Through the dispatcher, captured in a CUDA graph and replayed with other lengths."""
    case = Case(**DECODE, dtype=dtype)
    inputs, knobs = case.inputs()
    here = [item.to(DEVICE) for item in inputs]
    op = torch.ops.optc.paged_attention_
    op(*here, **knobs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*here, **knobs)
    here[7].copy_(torch.tensor([1, 10, 3, 34]))
    for request, length in enumerate((1, 10, 3, 34)):
        block = int(inputs[6][request, (length - 1) // 16])
        here[5][request] = block * 16 + (length - 1) % 16
    for _ in range(3):
        graph.replay()
    exact = [item.cpu().double() if item.is_floating_point() else item.cpu() for item in here]
    exact[6].clamp_(min=0)
    expected = reference("paged_attention_")(*exact, **knobs)
    assert float((out.cpu().double() - expected).abs().max()) < 2e-2 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({0: torch.zeros(4, 4, 16).double()}, "q, k, v and the pools differ in type"),
        ({5: torch.zeros(4, dtype=torch.int32)}, "argument 5 is torch.int32; the kernel takes torch.int64"),
        ({9: torch.zeros(4)}, "argument 9 is torch.float32; the kernel takes torch.int64"),
        ({0: torch.zeros(4, 4, 512)}, "heads of 512 features; the kernel takes up to 256"),
        ({0: torch.zeros(4, 130, 16)}, "130 query heads for 2 KV heads; the kernel takes up to 64 for one"),
        ({3: torch.zeros(9, 16, 16, 2).mT}, "the features of a head are not neighbours in the pools"),
        ({10: torch.zeros(8).half()}, "inv_freq is torch.float16; the kernel takes torch.float32"),
        ({10: torch.zeros(9)}, "9 frequencies for heads of 16 features"),
        ({11: torch.zeros(8)}, "a norm's weight is not one of a head's features"),
        (
            dict.fromkeys(range(5), torch.zeros(4, 2, 16, 16).double()),
            "keys and values of type float64; the kernel takes float32, bfloat16, float16",
        ),
    ],
)
def test_says_what_it_takes(changes: dict[int, Tensor], reason: str | None) -> None:
    inputs, knobs = Case(**DECODE).inputs()
    args: list[Any] = [*inputs, torch.zeros(4, dtype=torch.int64), torch.zeros(8), None, None]
    for index, value in changes.items():
        args[index] = value
    assert accepts_rotary(args, knobs) == reason
    if max(changes, default=0) < 9:
        assert accepts(args[:9], knobs) == reason


def test_factors_of_scores_are_positive() -> None:
    inputs, knobs = Case(**DECODE).inputs()
    assert accepts(inputs, knobs | {"scale": -0.5}) == "scores times -0.5; the kernel takes positive factors"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("name", ["mixed", "mixed, window and softcap", "long"])
def test_tiles_of_whole_blocks(name: str, tile: int, dtype: torch.dtype) -> None:
    """Tiles that all rows see and those that they see in part, of one block and of two."""
    case = {"long": Case(new=(1, 70), past=(40, 60), block_size=16)}.get(name) or CASES[name]
    case = _in(dataclasses.replace(case, block_size=16), dtype)
    tiles = dataclasses.replace(SMALL_PREFILL, tile=tile)
    check(case, turns(case, case.width // 2, norm=False), tiles=(SMALL_TILES[0], tiles), strided=True)


def test_chunks_are_refused() -> None:
    inputs, knobs = Case(**DECODE).inputs()
    assert accepts(inputs, {**knobs, "window": -8}) == "attention in chunks is not lowered"

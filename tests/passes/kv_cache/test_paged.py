"""page-kv-cache: the paged decoder computes what the full forward computes, however tokens are fed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import torch
from stages import apply, captured, full_logits, largest, rewritten, sequences, tiny_decoder
from torch import Tensor

from optc.compiler.diagnostics import UsageError
from optc.compiler.execution.block_manager import BlockManager
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.contract import Input
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.tokenwise import mixing_error
from optc.passes.kv_cache.paged import PageKVCache

FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "mistral", "phi", "mixtral"]
BLOCK = 4


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_full_forward(family: str) -> None:
    program, rows = captured(family), sequences(29, 1, 41, 6)
    result = rewritten(PageKVCache(block_size=BLOCK), family)
    assert (result.matched, result.candidates) == (2, 2)
    expected = [full_logits(program, row) for row in rows]
    assert largest(run_stage(result.program, rows).logits, expected) < 1e-5


@pytest.fixture(scope="module")
def paged() -> Program:
    return rewritten(PageKVCache(block_size=BLOCK), "mistral").program


class _Pool:
    """A paged program with shuffled blocks and pools full of garbage."""

    def __init__(self, program: Program, num_blocks: int) -> None:
        generator = torch.Generator().manual_seed(5)
        order = torch.randperm(num_blocks, generator=generator).tolist()
        self.program, self.manager = program, BlockManager(num_blocks, BLOCK, order=order)
        shapes = [spec.dims for spec in program.contract.inputs if spec.role in ("key_cache", "value_cache")]
        self.pools = [torch.randn((num_blocks, *dims[1:]), generator=generator) for dims in shapes]  # type: ignore[arg-type]

    def feed(self, *work: tuple[int, Sequence[int]]) -> list[Tensor]:
        """Logits [n, V] of each request's new tokens."""
        logits = self.program(*self.manager.step(work), *self.pools)
        for request, _ in work:
            self.manager.commit(request)
        return list(logits.split([len(tokens) for _, tokens in work]))


def test_chunked_prefill_beside_decode(paged: Program) -> None:
    """Requests join and leave; one call mixes a long prompt's chunk with others' single tokens."""
    rows = sequences(21, 10, 7)
    expected = [full_logits(captured("mistral"), row) for row in rows]
    pool = _Pool(paged, 16)
    got: list[list[Tensor]] = [[], [], []]

    def feed(*spans: tuple[int, int, int]) -> None:
        parts = pool.feed(*((row, rows[row][start:end]) for row, start, end in spans))
        for (row, _, _), part in zip(spans, parts, strict=True):
            got[row].append(part)

    pool.manager.start(0)
    feed((0, 0, 5))
    pool.manager.start(1)
    feed((1, 0, 8), (0, 5, 6))
    feed((0, 6, 19), (1, 8, 9))
    pool.manager.start(2)
    feed((2, 0, 7), (1, 9, 10), (0, 19, 20))
    pool.manager.free(1)
    feed((0, 20, 21))
    assert largest([torch.cat(parts) for parts in got], expected) < 1e-5
    assert pool.manager.peak_used_blocks == 5 + 3 + 2
    assert pool.manager.waste() == 3 + 1


def test_prefix_reuse_reproduces_logits_without_recomputing(paged: Program) -> None:
    first, other = sequences(15, 9)
    second = first[:13] + other
    expected = full_logits(captured("mistral"), second)
    pool = _Pool(paged, 16)
    assert pool.manager.start(0, first) == 0
    pool.feed((0, first))
    shared = pool.manager.slots(0)[:12]
    before = [p.flatten(0, 1)[shared].clone() for p in pool.pools]
    reused = pool.manager.start(1, second)
    assert reused == 12  # three full blocks of the 13 common tokens
    (logits,) = pool.feed((1, second[reused:]))
    assert largest([logits], [expected[reused:]]) < 1e-5
    assert pool.manager.slots(1)[:12] == shared
    for pools, old in zip(pool.pools, before, strict=True):
        assert torch.equal(pools.flatten(0, 1)[shared], old)


def test_freed_prefix_and_rewound_request(paged: Program) -> None:
    first, other = sequences(15, 9)
    pool = _Pool(paged, 8)
    pool.manager.start(0, first)
    pool.feed((0, first))
    pool.manager.free(0)
    again = first[:8] + other
    assert pool.manager.start(1, again) == 8
    pool.feed((1, again[8:]))
    kept = pool.manager.rewind(1, 10)
    assert kept == 10
    branch = again[:10] + first[:5]
    (logits,) = pool.feed((1, branch[kept:]))
    assert largest([logits], [full_logits(captured("mistral"), branch)[kept:]]) < 1e-5


def test_contract(paged: Program) -> None:
    contract = paged.contract
    assert [(spec.name, spec.dtype, spec.dims) for spec in contract.inputs[:6]] == [
        ("input_ids", "int64", ("tokens",)),
        ("position_ids", "int64", ("tokens",)),
        ("slot_mapping", "int64", ("tokens",)),
        ("block_tables", "int32", ("requests", "max_blocks")),
        ("context_lens", "int32", ("requests",)),
        ("cu_seqlens", "int32", ("requests_plus_1",)),
    ]
    dims = ("num_blocks", BLOCK, 2, 16)
    assert contract.inputs[6:] == tuple(
        Input(name=f"past_key_values.{i}.{part}", role=role, dtype="float32", dims=dims)
        for i in range(2)
        for part, role in (("key", "key_cache"), ("value", "value_cache"))
    )
    assert [output.name for output in contract.outputs] == ["logits"]
    assert (contract.kv_cache.kind, contract.kv_cache.in_place, contract.kv_cache.block_size) == (
        "paged",
        True,
        BLOCK,
    )
    assert contract.sources == captured("mistral").contract.sources


def test_every_layer_has_its_own_pools(paged: Program) -> None:
    """One whole tensor per layer for K and V: views of a stacked pool are miscompiled by AOTInductor."""
    calls = paged.calls(torch.ops.optc.paged_attention_.default)
    pools = [pool for call in calls for pool in call.args[3:5]]
    assert pools == paged.user_inputs()[6:]


def test_no_axis_is_specialized(paged: Program) -> None:
    symbols: dict[str, set[str]] = {}
    for spec, node in zip(paged.contract.inputs, paged.user_inputs(), strict=True):
        for size, axis in zip(node.meta["val"].shape, spec.dims, strict=True):
            if isinstance(axis, str):
                assert isinstance(size, torch.SymInt), f"{spec.name}: {axis} became {size}"
                symbols.setdefault(axis, set()).add(str(size))
    assert all(len(names) == 1 for names in symbols.values()), symbols
    (requests,) = symbols["requests"]
    assert symbols["requests_plus_1"] == {f"{requests} + 1"}
    assert len({name for names in symbols.values() for name in names}) == 5


def test_one_token_of_one_request(paged: Program) -> None:
    pool = _Pool(paged, 1)
    pool.manager.start(0)
    (logits,) = pool.feed((0, [17]))
    assert largest([logits], [full_logits(captured("mistral"), [17])]) < 1e-5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"causal": False}, "the attention is not causal: old tokens see new ones"),
        ({"padding": True}, "the attention has a padding mask beside the causal one"),
        ({"sinks": True}, "the attention has sinks, which this cache's attention lacks"),
        ({"mix": "positions"}, "the logits of a token depend on other tokens outside attention"),
        ({"mix": "mean"}, "the logits of a token depend on other tokens outside attention"),
        ({"mix": "conv"}, "the logits of a token depend on other tokens outside attention"),
        ({"mix": "values"}, "the logits of a token depend on other tokens outside attention"),
    ],
)
def test_refuses_what_paging_would_change(options: dict[str, object], reason: str) -> None:
    program = tiny_decoder(**options)  # type: ignore[arg-type]
    result = apply(PageKVCache(), program)
    assert (result.matched, result.candidates) == (0, 1)
    assert result.misses[0].reason.startswith(reason)
    assert result.program is program


def test_mixing_error_tells_rounding_from_mixing() -> None:
    assert mixing_error(tiny_decoder()) < 1e-6
    assert mixing_error(captured("mixtral")) < 3e-6
    assert mixing_error(tiny_decoder("mean")) > 0.1


def test_accepts_the_same_decoder_without_mixing() -> None:
    program, rows = tiny_decoder(), sequences(30, 3)
    result = apply(PageKVCache(block_size=BLOCK), program)
    assert result.matched == 1
    expected = [full_logits(program, row) for row in rows]
    assert largest(run_stage(result.program, rows).logits, expected) < 1e-5


def test_refuses_without_position_rule() -> None:
    program = tiny_decoder().with_contract(position_rule=False)
    reason = "its inputs are not input_ids and position_ids, counted up within a row"
    assert apply(PageKVCache(), program).misses[0].reason == reason
    swapped = tiny_decoder()
    inputs = tuple(msgspec.structs.replace(spec, role="input") for spec in swapped.contract.inputs)
    assert apply(PageKVCache(), swapped.with_contract(inputs=inputs)).misses[0].reason == reason


def test_block_size_must_be_positive() -> None:
    with pytest.raises(UsageError, match="block size 0 is not positive"):
        apply(PageKVCache(block_size=0), tiny_decoder())

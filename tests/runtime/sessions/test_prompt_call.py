"""Prompts of the CUDA target in calls of sizes that repeat, on the CPU: against calls of their own sizes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cuda_sessions import LENGTHS, compiled
from families import FAMILIES
from recorded_calls import Recordings
from rewrites import stirred
from stages import apply, sequences
from torch.fx import Node

from optc.compiler.capture import capture_model
from optc.compiler.execution.block_manager import BlockManager
from optc.compiler.ir.program import Program
from optc.compiler.kernels.cuda.dispatch import told_prompt
from optc.compiler.kernels.cuda.paged_attention import LEAST_DENSE
from optc.passes.fusion.decode import FuseDecode
from optc.passes.fusion.projections import MergeProjections
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.legalization.cuda import LegalizeCuda
from optc.passes.quantization.rtn import QuantizeRtn
from optc.runtime.generation.generate import generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import (
    LONG_CHUNK,
    MemoryPlan,
    activation_bytes,
    call_bytes,
    dequantized_bytes,
    longest_call,
    plan_memory,
)
from optc.runtime.sessions.paged import PREFILL_CHUNK, block_bytes
from optc.runtime.sessions.prompt_call import PromptCall, call_size, token_size, token_sizes

KINDS = ["llama", "gemma2", "gpt2", "mixtral", "phi3"]


def session(prompt_tokens: int = 256, family: str = "llama", record: Recordings | None = None) -> CudaSession:
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=40, prompt_tokens=prompt_tokens)
    return CudaSession(compiled(family), plan, record=record)


def test_long_prompts_are_one_call_of_a_size_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded, and never recorded; calls up to the chunk of others are as they were."""
    monkeypatch.setattr("optc.runtime.sessions.cuda.PREFILL_CHUNK", 16)
    tokens, records = list(range(3, 44)), Recordings()
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=40, prompt_tokens=16, chunk=64)
    long = CudaSession(compiled("llama"), plan, record=records)
    assert (long.prefill_chunk, long.model.chunk) == (64, 16)
    expected = session(prompt_tokens=0).prefill([tokens])
    for _ in range(2):
        np.testing.assert_allclose(long.prefill([tokens]), expected, rtol=0, atol=1e-4)
    assert {key: call.recorded for key, call in long._prompts.items()} == {(48, 2): False}
    long.prefill([tokens[:9]])
    assert set(long._prompts) == {(48, 2), (16, 2)}


def test_no_call_that_is_captured_asks_for_lengths() -> None:
    """Attention of more tokens reads them on the host."""
    assert LEAST_DENSE > PREFILL_CHUNK


def test_calls_are_long_where_weights_are_large_and_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled("llama")
    assert longest_call(program, 1 << 40) == 4096
    monkeypatch.setattr("optc.runtime.sessions.cuda_memory._LARGE", 1)
    least = 16 * call_bytes(program, LONG_CHUNK)
    assert [longest_call(program, free) for free in (least - 16, least)] == [4096, 8192]
    plan = plan_memory(program, 1 << 40, chunk=LONG_CHUNK)
    assert (plan.chunk, plan.prompt_tokens) == (8192, 4096)
    assert plan.working - plan_memory(program, 1 << 40, chunk=4096).working == activation_bytes(program, 4096)


def test_sizes() -> None:
    assert token_sizes(4096)[:13] == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280]
    assert token_sizes(4096)[-2:] == [3840, 4096]
    for tokens in range(1, 4097):
        size = token_size(tokens)
        assert tokens <= size
        assert size in token_sizes(4096)
        assert size - tokens < max(16, min(256, tokens / 2))
    assert call_size(5, 1) == (16, 2)
    assert call_size(100, 3) == (128, 4)
    assert call_size(100, 4) == (128, 8)
    assert call_size(16, 16) == (48, 32), "as many requests as tokens would mean one token each"
    for tokens, requests in itertools.product((1, 2, 15, 16, 33, 100), (1, 2, 3, 8, 31, 100)):
        if requests <= tokens:
            size, most = call_size(tokens, requests)
            assert requests < most < size
            assert tokens <= size


def test_padding_is_a_request_of_its_own() -> None:
    """And what an earlier call left is gone."""
    given: list[list[int]] = []

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        given[:] = [item.tolist() for item in inputs]
        return torch.arange(8.0).view(4, 2)

    call = PromptCall(run, [torch.zeros(1)], tokens=16, requests=4, width=2, record=None)
    manager = BlockManager(4, 8)
    for row in range(3):
        manager.start(row)
    call(manager.step([(0, range(20, 29)), (1, range(40, 44)), (2, [60])]))
    logits = call(manager.step([(0, [29, 30]), (2, [61])]))
    assert logits.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    ids, positions, slots, tables, lengths, starts, rows, _ = given
    assert ids == [29, 30, 61] + [0] * 13
    assert positions == [9, 10, 1] + [0] * 13
    assert slots == [9, 10, 25] + [-1] * 13
    assert tables == [[0, 1], [3, 0], [0, 0], [0, 0]]
    assert lengths == [11, 2, 0, 0]
    assert starts == [0, 2, 3, 16, 16]
    assert rows == [1, 2, 0, 0]


def test_attention_is_told_of_a_prompt_that_is_alone() -> None:
    """From its beginning, and nothing beside it."""
    told: list[int | None] = []

    def run(*_: torch.Tensor) -> torch.Tensor:
        told.append(told_prompt())
        return torch.zeros(4, 2)

    call = PromptCall(run, [torch.zeros(1)], tokens=16, requests=4, width=2, record=None)
    manager = BlockManager(4, 8)
    for row in range(3):
        manager.start(row)
    for rows in ([(0, range(9))], [(0, range(9, 12))], [(1, range(5)), (2, range(3))]):
        call(manager.step(rows))  # type: ignore[arg-type]
    assert told == [9, 0, 0]
    assert told_prompt() is None


@pytest.mark.parametrize("family", KINDS)
def test_padding_changes_nothing(family: str) -> None:
    """Logits and what the pool holds, of ragged prompts: once, while recording, and replayed."""
    recordings = Recordings()
    ours, theirs = session(family=family, record=recordings), session(0, family)
    for turn in range(3):
        prompts = [[(token + turn) % 128 for token in row] for row in sequences(*LENGTHS)]
        found, expected = ours.prefill(prompts), theirs.prefill(prompts)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        for pool, other in zip(ours._pools, theirs._pools, strict=True):
            assert pool.isfinite().all()
            torch.testing.assert_close(pool, other, atol=2e-5, rtol=0)
    assert recordings.names == ["a prompt of 96 tokens"]
    assert recordings.replays == [2]
    assert not theirs._prompts


def test_prompts_of_three_lengths_replay_one_call() -> None:
    recordings = Recordings()
    ours, theirs = session(record=recordings), session(0)
    for length in (50, 64, 49, 57, 33):
        (prompt,) = sequences(length)
        np.testing.assert_allclose(ours.prefill([prompt]), theirs.prefill([prompt]), atol=2e-5)
    assert recordings.names == ["a prompt of 64 tokens"]
    assert recordings.replays == [3]


def test_prompts_that_begin_with_blocks_of_the_pool() -> None:
    """What is left of them goes through the calls of its own size; another number of prompts takes another call."""
    recordings = Recordings()
    ours, theirs = session(record=recordings), session(0)
    beginning, *ends = sequences(128, 5, 40, 64, 1)
    for batch in ([0], [1], [2], [0, 1], [3, 2, 1], [0, 1, 2]):
        prompts = [beginning + ends[place] for place in batch]
        np.testing.assert_allclose(ours.prefill(prompts), theirs.prefill(prompts), atol=2e-5)
        assert ours.pool_use == theirs.pool_use
    assert ours.pool_use.reused_tokens == 10 * 128
    for one in (ours, theirs):
        one.rewind([130, 130, 130])
    rows = sequences(7, 3, 20)
    np.testing.assert_allclose(ours.extend(rows), theirs.extend(rows), atol=2e-5)
    assert set(ours._prompts) == {(192, 2), (48, 2), (64, 2), (48, 4), (128, 4), (32, 4)}
    assert recordings.names == ["a prompt of 128 tokens"]


def test_it_generates_the_same_tokens() -> None:
    ours, theirs = session(record=Recordings()), session(0)
    for lengths in ((30, 70), (28, 71), (40, 60), (31,), (17, 5, 9)):
        prompts = sequences(*lengths)
        assert generate(ours, prompts, max_new_tokens=8).tokens == generate(theirs, prompts, max_new_tokens=8).tokens


def test_longer_calls_and_scores_stay_as_they_are() -> None:
    recordings = Recordings()
    ours, theirs = session(64, record=recordings), session(0)
    for prompt in sequences(70, 71):
        np.testing.assert_array_equal(ours.prefill([prompt]), theirs.prefill([prompt]))
        np.testing.assert_array_equal(*(np.concatenate(list(one.score(prompt[:40]))) for one in (ours, theirs)))
    assert not ours._prompts
    assert not recordings.names
    many = [[token] for token in range(40)]
    ours.prefill(many[:15])
    assert set(ours._prompts) == {(32, 16)}
    ours.prefill(many)
    assert set(ours._prompts) == {(32, 16)}, "40 prompts need 64 requests, and more than 64 tokens"


def test_memory_of_graphs_is_planned() -> None:
    """As large a prompt as fits an eighth of what is free beside weights and working memory, and beside a given pool."""
    program, chunk = compiled(), 4096
    fixed = plan_memory(program, 1 << 40, chunk=chunk)
    assert (fixed.prompt_tokens, fixed.prompts) == (chunk, call_bytes(program, chunk))
    used = fixed.weights + fixed.working
    plan = plan_memory(program, used + 8 * call_bytes(program, 1024), chunk=chunk)
    assert (plan.prompt_tokens, plan.prompts) == (1024, call_bytes(program, 1024))
    assert plan.total == used + plan.pool + plan.prompts
    assert plan_memory(program, used + 8 * call_bytes(program, 1024) - 8, chunk=chunk).prompt_tokens == 768
    pool = 1000 * block_bytes(program.contract)
    plan = plan_memory(program, used + pool + call_bytes(program, 96), chunk=chunk, num_blocks=1000)
    assert (plan.prompt_tokens, plan.total) == (96, used + pool + call_bytes(program, 96))
    plan = plan_memory(program, used + pool, chunk=chunk, num_blocks=1000)
    assert (plan.prompt_tokens, plan.prompts) == (0, 0)
    unselected = apply(PageKVCache(), stirred("llama")).program
    assert plan_memory(unselected, 1 << 40, chunk=chunk).prompt_tokens == 0


def test_logits_of_selected_rows_are_not_of_every_token() -> None:
    """Those of every token are the largest activation where the vocabulary is wider than the MLP."""
    model, config, sizes = FAMILIES["llama"]
    captured = capture_model(model(config(**{**sizes, "vocab_size": 1000})).eval())
    every, selected = (apply(PageKVCache(select_logits=choice), captured).program for choice in (False, True))
    assert activation_bytes(every, 3) == 4 * 3 * 1000 * 4
    assert activation_bytes(selected, 3) == 4 * 3 * sizes["intermediate_size"] * 4


def test_products_of_prompts_take_packed_weights_dequantized() -> None:
    program = compiled()
    assert dequantized_bytes(program) == 0
    steps = (QuantizeRtn(bits=4, group_size=32), PageKVCache(), MergeProjections(), FuseDecode(), LegalizeCuda())
    quantized = stirred("llama")
    for step in steps:
        quantized = apply(step, quantized).program
    largest = max(math.prod(node.meta["val"].shape) for node in _matrices(quantized))
    assert dequantized_bytes(quantized) == 2 * largest * 4, "nibbles in bytes, of float32"


def _matrices(program: Program) -> list[Node]:
    return [node.args[1] for node in program.calls(torch.ops.optc.fused_linear.default) if node.kwargs.get("format")]

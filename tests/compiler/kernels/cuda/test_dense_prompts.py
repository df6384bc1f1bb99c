"""One long prompt attended over its own keys: against the reference, and what is left to the kernel over the pool."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU
from paged_cases import Case

from optc.compiler.kernels.cuda.attention.call import Call, Turn
from optc.compiler.kernels.cuda.attention.dense import attend_prompt, prompt_tokens, turned
from optc.compiler.kernels.cuda.attention.launch import attend
from optc.compiler.ops.dialect.paged import PADDING
from optc.compiler.ops.library import reference

NAMES = ("q", "k", "v", "k_pool", "v_pool", "slot_mapping", "block_tables", "context_lens", "cu_seqlens")
PROMPT = Case(new=(40, 8), past=(0, 0), heads=4, kv_heads=2, width=64, value_width=64, block_size=16)
TURN: dict[str, Any] = {"scaling": 1.25, "interleaved": False, "eps": 1e-5}


def call_of(case: Case, padding: int) -> tuple[Call, dict[str, Any], tuple[Any, ...]]:
    """With the last `padding` tokens being some; the call, its knobs, and arguments of the reference in float64."""
    inputs, knobs = case.inputs()
    if padding:
        inputs[5][-padding:] = PADDING
    generator = torch.Generator().manual_seed(3)
    position = torch.cat([torch.arange(n) + past for n, past in zip(case.new, case.past, strict=True)])
    inv_freq = 10000.0 ** (-torch.arange(16) / 16)
    norms = [(torch.rand(case.width, generator=generator) + 0.5).to(case.dtype) for _ in "qk"]
    turn = (position, inv_freq, *norms)
    wide = tuple(item.double() if item.is_floating_point() else item.clone() for item in (*inputs, *turn))
    here = [item.to(DEVICE) for item in (*inputs, *turn)]
    made = Turn(**dict(zip(("position", "inv_freq", "q_norm", "k_norm"), here[9:], strict=True)), **TURN)
    return Call(**dict(zip(NAMES, here[:9], strict=True)), **knobs, turn=made), knobs, wide  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", FLOATS)
def test_equals_reference(dtype: torch.dtype) -> None:
    """With padding behind, whose rows are zeros."""
    call, knobs, wide = call_of(dataclasses.replace(PROMPT, dtype=dtype), padding=8)
    found = attend_prompt(call, least=16)
    if dtype is torch.float32 and HAS_GPU:
        assert found is None, "cuDNN's is of 16 bits"
        return
    assert found is not None
    expected = reference("rotary_paged_attention_")(*wide, **TURN, **knobs)
    largest = float(expected.abs().max())
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert float((found.cpu().double() - expected).abs().max()) <= bound * largest
    assert found.shape == expected.shape
    assert not found[40:].any()


def test_without_a_turn_nothing_is_copied() -> None:
    call, _, _ = call_of(PROMPT, padding=8)
    assert turned(dataclasses.replace(call, turn=None)) == (call.q, call.k, call.v)


def test_what_is_left_to_the_pool() -> None:
    """Short calls, other requests, earlier tokens, padding in between, windows, softcaps and other widths."""
    call, _, _ = call_of(PROMPT, padding=8)
    assert prompt_tokens(call) == 40
    assert attend_prompt(call) is None
    assert prompt_tokens(call_of(PROMPT, padding=0)[0]) is None
    assert prompt_tokens(call_of(dataclasses.replace(PROMPT, past=(3, 0)), padding=8)[0]) is None
    between = call.slot_mapping.clone()
    between[4] = PADDING
    assert prompt_tokens(dataclasses.replace(call, slot_mapping=between)) is None
    for changes in ({"window": 9}, {"softcap": 5.0}):
        assert attend_prompt(dataclasses.replace(call, **changes), least=16) is None  # type: ignore[arg-type]
    narrow, _, _ = call_of(dataclasses.replace(PROMPT, width=32, value_width=32), padding=8)
    assert attend_prompt(narrow, least=16) is None


def test_a_long_call_is_attended_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher, which writes keys and values besides."""
    call, _, _ = call_of(PROMPT, padding=8)
    marked = torch.full((48, 4, 64), 0.5)
    before = call.k_pool.clone()
    monkeypatch.setattr("optc.compiler.kernels.cuda.attention.launch.attend_prompt", lambda _: marked)
    assert attend(call) is marked
    assert not torch.equal(before.nan_to_num(), call.k_pool.nan_to_num())

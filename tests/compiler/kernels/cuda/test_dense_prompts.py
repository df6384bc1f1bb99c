"""One long prompt attended over its own keys: against the reference, and what is left to the kernel over the pool."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU
from paged_cases import Case

from optc.compiler.kernels.cuda.attention.call import Call, Turn
from optc.compiler.kernels.cuda.attention.dense import attend_prompt, prompt_tokens
from optc.compiler.kernels.cuda.attention.launch import attend
from optc.compiler.kernels.cuda.dispatch import whole_prompt
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
    check(found, call, knobs, wide)


def check(found: torch.Tensor, call: Call, knobs: dict[str, Any], wide: tuple[Any, ...]) -> None:
    """Results of 40 tokens and of padding behind them, and the pools."""
    expected = reference("rotary_paged_attention_")(*wide, **TURN, **knobs)
    bound = 1e-5 if found.dtype is torch.float32 else 2e-2
    assert float((found.cpu().double() - expected).abs().max()) <= bound * float(expected.abs().max())
    assert found.shape == expected.shape
    assert not found[40:].any()
    for pool, wanted in zip((call.k_pool, call.v_pool), wide[3:5], strict=True):
        torch.testing.assert_close(pool.cpu().double(), wanted, rtol=bound, atol=bound, equal_nan=True)


def test_what_the_host_says_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.compiler.kernels.cuda.attention.dense.prompt_tokens", lambda _: pytest.fail("asked"))
    call, knobs, wide = call_of(dataclasses.replace(PROMPT, dtype=torch.bfloat16), padding=8)
    with whole_prompt(0):
        assert attend_prompt(call, least=16) is None
    with whole_prompt(40):
        found = attend_prompt(call, least=16)
    assert found is not None
    check(found, call, knobs, wide)


def test_what_is_left_to_the_pool() -> None:
    """Short calls, other requests, earlier tokens, padding in between, windows, softcaps, heads that are not turned and other
    widths."""
    call, _, _ = call_of(PROMPT, padding=8)
    assert prompt_tokens(call) == 40
    assert attend_prompt(call) is None
    assert prompt_tokens(call_of(PROMPT, padding=0)[0]) is None
    assert prompt_tokens(call_of(dataclasses.replace(PROMPT, past=(3, 0)), padding=8)[0]) is None
    between = call.slot_mapping.clone()
    between[4] = PADDING
    assert prompt_tokens(dataclasses.replace(call, slot_mapping=between)) is None
    for changes in ({"window": 9}, {"softcap": 5.0}, {"turn": None}):
        assert attend_prompt(dataclasses.replace(call, **changes), least=16) is None  # type: ignore[arg-type]
    narrow, _, _ = call_of(dataclasses.replace(PROMPT, width=32, value_width=32), padding=8)
    assert attend_prompt(narrow, least=16) is None


def test_a_long_call_is_attended_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher; keys and values are written once."""
    call, knobs, wide = call_of(dataclasses.replace(PROMPT, dtype=torch.bfloat16), padding=8)
    long = functools.partial(attend_prompt, least=16)
    monkeypatch.setattr("optc.compiler.kernels.cuda.attention.launch.attend_prompt", long)
    monkeypatch.setattr("optc.compiler.kernels.cuda.attention.launch.write_new", lambda _: pytest.fail("written twice"))
    check(attend(call), call, knobs, wide)

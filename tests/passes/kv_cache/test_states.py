"""Recurrent layers over a state per row: what static-kv-cache makes of them computes what the full forward computes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import ROOT
from stages import apply, full_logits, largest, sequences

from optc.compiler.capture import capture_model
from optc.compiler.diagnostics import TargetError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.contract import STATE_ROLE
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass
from optc.passes.kv_cache.fixed import FixedKVCache
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.runtime.generation.generate import generate
from optc.runtime.sessions.program import open_program
from optc.runtime.sessions.session import Session

sys.path.insert(0, str(ROOT / "benchmarks"))
from zoo_models import Kind, build

LENGTHS = (17, 5, 1, 9)


def _captured(name: str, architecture: str) -> Program:
    return capture_model(build(Kind("causal", name, architecture)), prove=False)


@pytest.fixture(scope="module")
def whole() -> Program:
    """Mamba 2: no attention at all."""
    return _captured("mamba2", "Mamba2ForCausalLM")


@pytest.fixture(scope="module")
def written(whole: Program) -> Program:
    return apply(StaticKVCache(in_place=True, states=True), whole).program


def test_equals_full_forward(whole: Program, written: Program) -> None:
    """States begin full of garbage; ragged prefill, a chunk, single tokens."""
    rows = sequences(*LENGTHS)
    expected = [full_logits(whole, row) for row in rows]
    result = apply(StaticKVCache(select_logits=True, states=True), whole)
    assert (result.matched, result.candidates) == (4, 4)
    for program in (result.program, written):
        assert largest(run_stage(program, rows).logits, expected) < 1e-5
    states = [spec.dims for spec in written.contract.inputs if spec.role == STATE_ROLE]
    assert states == [("batch", 144, 3), ("batch", 8, 8, 16)] * 2


def test_beside_keys_and_values() -> None:
    """The gated delta rule in one layer, attention in the other."""
    program, rows = _captured("qwen3_next", "Qwen3NextForCausalLM"), sequences(*LENGTHS)
    cached = apply(StaticKVCache(in_place=True, states=True), program).program
    assert [spec.role for spec in cached.contract.inputs[2:]] == ["key_cache", "value_cache", STATE_ROLE, STATE_ROLE]
    assert largest(run_stage(cached, rows).logits, [full_logits(program, row) for row in rows]) < 1e-4


@pytest.mark.parametrize("rewrite", [PageKVCache(), FixedKVCache(), StaticKVCache()])
def test_caches_without_states_refuse(rewrite: Pass, whole: Program) -> None:
    misses = apply(rewrite, whole).misses
    assert len(misses) == 4
    assert misses[0].reason == "a recurrent layer: this cache holds keys and values, and no states"


@pytest.fixture
def session(written: Program) -> Session:
    return open_program(written)


def test_a_row_begins_anew_and_cannot_go_back(session: Session) -> None:
    rows = sequences(7, 4)
    first = session.prefill(rows)
    session.extend([[5], [6]])
    with pytest.raises(TargetError, match="cannot rewind row 0 from 8 to 7 tokens") as raised:
        session.rewind([7, 4])
    assert raised.value.exit_code == 4
    assert session.lengths == [8, 5]
    session.rewind([0, 0])
    np.testing.assert_allclose(session.extend(rows), first, atol=1e-5)


def test_rows_that_stop_do_not_disturb_the_others(session: Session) -> None:
    prompts = sequences(7, 4)
    alone = [generate(session, [prompt], max_new_tokens=6, stop_ids=()).tokens[0] for prompt in prompts]
    together = generate(session, prompts, max_new_tokens=6, stop_ids=(alone[0][1],)).tokens
    assert len(together[0]) <= 2
    assert together[1] == alone[1][: len(together[1])]
    assert len(together[1]) > 2


def test_a_conversation_continues_where_it_ended(session: Session) -> None:
    prompt, more = sequences(7, 4)
    expected = session.prefill([[*prompt, *more]])
    session.prefill([prompt])
    np.testing.assert_allclose(session.extend([more]), expected, atol=1e-5)
    for held in (7, 3):  # all that the row holds, and less
        session.prefill([prompt])
        found = generate(session, [[*prompt, *more]], max_new_tokens=1, stop_ids=(), held=[held]).tokens
        assert found == [[int(expected[0].argmax())]]

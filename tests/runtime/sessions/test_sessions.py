"""Every kind of session against transformers' full forward, on Programs run eagerly."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model

from optc.compiler.capture import capture_model
from optc.compiler.diagnostics import InputError, ResourceError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.runtime.sessions import session as session_module
from optc.runtime.sessions.linear import lazy_zeros
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.sessions.program import open_program
from optc.runtime.sessions.session import Session

KINDS = ("recompute", "functional", "in-place", "paged")
RAGGED = [[5, 9, 2, 77, 31], [8], list(range(3, 42)), [100, 4, 100, 4]]


@cache
def _model() -> Any:
    return make_model("llama")


@cache
def _program(kind: str) -> Program:
    program = capture_model(_model())
    passes = {
        "functional": StaticKVCache(in_place=False),
        "in-place": StaticKVCache(in_place=True),
        "paged": PageKVCache(block_size=4),
    }
    return passes[kind].run(program, PassContext()).program if kind in passes else program


@pytest.fixture(params=KINDS)
def session(request: pytest.FixtureRequest) -> Session:
    return open_program(_program(request.param))


def expected(rows: list[list[int]]) -> np.ndarray:
    """Logits of the last token of each row, by transformers, one row at a time."""
    with torch.no_grad():
        return np.stack([_model()(torch.tensor([row])).logits[0, -1].numpy() for row in rows])


def _close(found: np.ndarray, rows: list[list[int]]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(rows), atol=2e-5)


def test_ragged_prefill_and_decode(session: Session) -> None:
    rows = [list(row) for row in RAGGED]
    _close(session.prefill(rows), rows)
    for step in range(6):
        tokens = [(7 * step + row) % 128 for row in range(len(rows))]
        logits = session.decode(tokens)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        _close(logits, rows)
    assert session.lengths == [len(row) for row in rows]


def test_continuation_by_unequal_chunks(session: Session) -> None:
    rows = [list(row) for row in RAGGED]
    session.prefill(rows)
    for chunk in ([[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11]], [[9, 9], [9], [9, 9, 9], [9]]):
        logits = session.extend(chunk)
        for row, new in zip(rows, chunk, strict=True):
            row.extend(new)
        _close(logits, rows)


def test_rewind_then_another_continuation(session: Session) -> None:
    session.prefill(RAGGED)
    session.decode([1, 2, 3, 4])
    session.rewind([2, 1, 17, 0])
    assert session.lengths == [2, 1, 17, 0]
    tails = [[50, 51], [52], [53], [54, 55, 56]]
    logits = session.extend(tails)
    _close(logits, [[*row[:n], *tail] for row, n, tail in zip(RAGGED, (2, 1, 17, 0), tails, strict=True)])


def test_a_new_batch_forgets_the_old(session: Session) -> None:
    session.prefill(RAGGED)
    session.decode([1, 2, 3, 4])
    for rows in ([[3, 1, 4, 1, 5], [9, 2], [6], [5, 3, 5]], [[8, 9, 7]]):
        _close(session.prefill(rows), rows)


def test_long_prompts_run_in_chunks(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LOGITS_BYTES", 4 * 128 * 8)
    assert session.chunk == 8
    _close(session.prefill(RAGGED), RAGGED)
    _close(session.decode([1, 1, 1, 1]), [[*row, 1] for row in RAGGED])


def test_score_gives_every_token(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LOGITS_BYTES", 4 * 128 * 16)
    session.prefill(RAGGED)
    tokens = RAGGED[2]
    parts = list(session.score(tokens))
    assert [len(part) for part in parts] == [16, 16, 7]
    with torch.no_grad():
        whole = _model()(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-5)
    _close(session.extend([[11]]), [[*tokens, 11]])


def test_capacity_grows_past_its_first_size(session: Session) -> None:
    rows = [[i % 128 for i in range(200)], [3, 2, 1]]
    session.prefill(rows)
    tails = [[i % 90 for i in range(56)], [7]]
    _close(session.extend(tails), [rows[0] + tails[0], rows[1] + tails[1]])
    assert session.lengths == [256, 4]
    with pytest.raises(InputError):
        session.decode([1, 1])


def test_logits_are_the_callers(session: Session) -> None:
    first = session.prefill([[1, 2, 3]])
    kept = first.copy()
    session.decode([4])
    assert (first == kept).all()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, 128]], "token id 128 is outside the vocabulary"),
        ([[1], [-1]], "token id -1 is outside the vocabulary"),
        ([[1] * 257], "a row of 257 tokens does not fit the context of 256"),
    ],
)
def test_bad_prompts(session: Session, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(InputError) as caught:
        session.prefill(prompts)
    assert caught.value.what == message


def test_bad_continuations(session: Session) -> None:
    session.prefill([[1] * 255, [2]])
    with pytest.raises(InputError, match="token id 999 is outside the vocabulary"):
        session.decode([3, 999])
    with pytest.raises(UsageError, match=r"1 row\(s\) given to a session of 2"):
        session.decode([3])
    with pytest.raises(UsageError, match="cannot rewind row 1 to 2 tokens"):
        session.rewind([3, 2])
    session.decode([3, 3])
    with pytest.raises(InputError, match="a row of 257 tokens does not fit") as caught:
        session.decode([3, 3])
    assert caught.value.where == "prompt 0, after 256 tokens in the cache"
    assert caught.value.remedy == "shorten it by 1 token(s)"


# -- paging ---------------------------------------------------------------------------------


def _paged(num_blocks: int) -> PagedSession:
    session = open_program(_program("paged"), num_blocks=num_blocks)
    assert isinstance(session, PagedSession)
    return session


def test_prefixes_are_reused_across_and_within_batches() -> None:
    session, shared = _paged(64), list(range(20, 40))
    session.prefill([[*shared, 1, 2]])
    assert session.pool_use.reused_tokens == 0
    rows = [[*shared, 3], [60, 61, 62, 63, 64, 65], [60, 61, 62, 63, 70]]
    _close(session.prefill(rows), rows)
    assert session.pool_use.reused_tokens == 20 + 4
    # A shared block is not written again: the row that rewinds into it gets one of its own.
    session.rewind([21, 6, 2])
    _close(session.extend([[5], [6], [7, 8]]), [[*rows[0], 5], [*rows[1], 6], [60, 61, 7, 8]])


def test_waste_is_counted_in_slots() -> None:
    session = _paged(64)
    session.prefill([[1, 2, 3, 4, 5], [6]])  # blocks of 4: 2 and 1, so 8 - 5 and 4 - 1 slots are empty
    use = session.pool_use
    assert (use.peak_used_blocks, use.peak_waste, use.num_blocks, use.block_size) == (3, 6, 64, 4)


def test_pool_that_is_too_small() -> None:
    with pytest.raises(ResourceError, match="out of blocks"):
        _paged(2).prefill([[1] * 9])
    with pytest.raises(UsageError, match="num-blocks 0 is out of range"):
        _paged(0)


def test_lazy_zeros_begin_on_a_cache_line() -> None:
    found = lazy_zeros((3, 5), np.float32)
    assert found.shape == (3, 5)
    assert found.dtype == np.float32
    assert found.ctypes.data % 64 == 0
    assert not found.any()

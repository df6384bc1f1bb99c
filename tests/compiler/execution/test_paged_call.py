"""The layout of a call of a paged program, by hand and as its two callers make it."""

from __future__ import annotations

import numpy as np

from optc.compiler.execution.block_manager import BlockManager
from optc.compiler.execution.paged_call import lay_out
from optc.runtime.serving.model_runner import step_inputs
from optc.runtime.serving.plan import Piece, Plan
from optc.runtime.serving.rows import Kind, Rows


def test_tokens_lie_end_to_end() -> None:
    """Two requests in blocks of 4: three tokens behind six, and one behind none."""
    tables = np.array([[7, 2, 5], [3, 0, 0]], np.int32)
    found = lay_out(np.array([6, 0]), np.array([3, 1]), tables, 4)
    assert found.owner.tolist() == [0, 0, 0, 1]
    assert found.positions.tolist() == [6, 7, 8, 0]
    assert found.slots.tolist() == [2 * 4 + 2, 2 * 4 + 3, 5 * 4, 3 * 4]
    assert found.lengths.tolist() == [9, 1]
    assert found.bounds.tolist() == [0, 3, 4]
    assert [item.dtype for item in found[1:]] == [np.int64, np.int64, np.int32, np.int32, np.int32]


def test_an_engine_lays_out_what_a_session_does() -> None:
    manager, rows = BlockManager(8, 4, order=[5, 1, 7, 0, 2, 3, 4, 6]), Rows(2, 16, 4)
    texts = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    for row, tokens in enumerate(texts):
        manager.start(row)
        taken = rows.take(
            str(row), tokens, end=16, stops=[], single=False, kind=Kind.GREEDY, told=len(tokens), plain=False
        )
        assert taken == row
    manager.step([(0, texts[0][:4])])
    expected = manager.step([(0, texts[0][4:]), (1, texts[1])])
    for row in range(2):
        blocks = manager.blocks(row)
        rows.tables[row, : len(blocks)] = blocks
    none = np.zeros(0, np.int64)
    pieces = [Piece(0, 4, 2, True), Piece(1, 0, 3, True)]
    plan = Plan(none, none, none, pieces, np.array([0, 1]), np.zeros(2, np.int64), [], [])
    found, wanted = step_inputs(plan, rows)
    assert [item.tolist() for item in found] == [item.tolist() for item in expected]
    assert [item.dtype for item in found] == [item.numpy().dtype for item in expected]
    assert wanted.tolist() == [1, 4]

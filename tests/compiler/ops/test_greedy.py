"""greedy_step_ and advance_step_: the likeliest tokens, and the inputs of the next decode step."""

from __future__ import annotations

import pytest
import torch

import optc.compiler.ops.dialect.greedy  # noqa: F401 (registers the operators)


@pytest.mark.parametrize("chosen", [False, True])
def test_the_next_step(chosen: bool) -> None:
    """Within a block, into the next block, padding, and a token that is none; chosen by the op itself or before it."""
    ids, positions = torch.tensor([1, 2, 9, 5]), torch.tensor([2, 3, 0, 0])
    slots, lengths = torch.tensor([30, 3, -1, 12]), torch.tensor([3, 4, 0, 1], dtype=torch.int32)
    tables = torch.tensor([[7, 0], [0, 5], [0, 0], [3, 0]], dtype=torch.int32)
    logits = torch.nn.functional.one_hot(torch.tensor([11, 12, 13, 6]), 16).float()
    logits[3, 2] = float("nan")
    tokens = torch.tensor([11, 12, 13, -1])
    if chosen:
        torch.ops.optc.advance_step_(tokens, ids, positions, slots, lengths, tables, block_size=4)
    else:
        tokens = torch.ops.optc.greedy_step_(logits, ids, positions, slots, lengths, tables, block_size=4)
    assert tokens.tolist() == [11, 12, 13, -1]
    assert ids.tolist() == [11, 12, 9, 0]
    assert positions.tolist() == [3, 4, 0, 1]
    assert slots.tolist() == [31, 20, -1, 13]
    assert lengths.tolist() == [4, 5, 0, 2]


def test_beyond_the_table() -> None:
    """The step after the last one that has a block is never run, but its slot is computed."""
    ids, positions, slots = torch.tensor([1]), torch.tensor([7]), torch.tensor([7])
    lengths, tables = torch.tensor([8], dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32)
    torch.ops.optc.greedy_step_(torch.zeros(1, 3), ids, positions, slots, lengths, tables, block_size=4)
    assert (positions.tolist(), lengths.tolist()) == ([8], [9])

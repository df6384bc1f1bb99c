"""What a round of drafts does beside its products, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

import optc.compiler.ops.dialect.drafts  # noqa: F401 (registers the operators)

TABLES = torch.tensor([[7, 2, 5], [3, 4, 0], [9, 9, 9]], dtype=torch.int32)
"""Of blocks of 4."""


def heads() -> Tensor:
    """Requests at the end of a block, with room for two tokens, and padding."""
    return torch.tensor([[11, 12, 0], [3, 5, 0], [12, 7, 0], [2, 2, 0]])


def test_what_a_round_is_fed() -> None:
    drafts = torch.tensor([[21, 22], [31, 32], [41, 42]])
    state, inputs, lengths = heads(), torch.full((3, 9), -7), torch.full((10,), -7, dtype=torch.int32)
    state[3, 0] = 1  # of the first request one token is a draft
    torch.ops.optc.lay_out_drafts_(state, drafts, TABLES, *inputs, lengths, block_size=4)
    ids, positions, slots = inputs.tolist()
    assert ids == [11, 21, 0, 12, 31, 32, 0, 0, 0]
    assert positions == [3, 4, 5, 5, 6, 0, 0, 0, 0]
    assert slots == [31, 8, 9, 17, 18, -1, -1, -1, -1]
    assert lengths.tolist() == [4, 5, 6, 6, 7, 0, 0, 0, 0, 0]


def test_what_is_kept() -> None:
    drafts = torch.tensor([[21, 22], [31, 32], [41, 42]])
    decided = torch.tensor([21, 99, 22, 31, 32, 33, 41, 42, -1])
    state, picks = heads(), torch.full((3,), -7)
    inputs, lengths = torch.full((2, 2, 3), -7), torch.full((2, 3), -7, dtype=torch.int32)
    outcome, behind = torch.ops.optc.accept_drafts_(
        decided, state, drafts, TABLES, picks, *inputs, lengths, block_size=4, made=2
    )
    # One of two is right; both are, but the last has no slot of its own; padding gets nothing.
    assert outcome.tolist() == [[21, 99, 22, 2, 2], [31, 32, 33, 2, 1], [41, 42, -1, 0, 0]]
    assert behind.tolist() == [21, 99, 22, 31, 32, 33, 41, 42, 0]
    assert state.tolist() == [[99, 32, 0], [5, 7, 0], [12, 7, 0], [2, 2, 0]]
    assert picks.tolist() == [1, 4, 6]
    assert inputs.tolist() == [[[5, 0, 0], [6, 0, 0]], [[9, -1, -1], [10, -1, -1]]]
    assert lengths.tolist() == [[6, 0, 0], [7, 0, 0]]


def test_what_stands_still_goes_on_where_it_was() -> None:
    state = torch.tensor([[11], [5], [5], [2]])
    empty = torch.zeros((0, 1), dtype=torch.int64)
    outcome, _ = torch.ops.optc.accept_drafts_(
        torch.tensor([8, 9, 10]), state, torch.tensor([[8, 9]]), TABLES[:1], torch.zeros(1, dtype=torch.int64),
        empty, empty, empty.int(), block_size=4, made=2,
    )  # fmt: skip
    assert outcome.tolist() == [[8, 9, 10, 0, 0]]
    assert state.flatten().tolist() == [11, 5, 5, 0]


def test_what_is_drafted() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([2, 0, 1]), 4).float()
    logits[1, 3] = float("nan")
    drafts = torch.full((4, 2), -7)
    tokens = torch.ops.optc.choose_draft_(logits, torch.tensor([5, 50, 500, 5000]), drafts, place=1)
    assert tokens.tolist() == [500, 5, 50]
    assert drafts.tolist() == [[-7, 500], [-7, 5], [-7, 50], [-7, -7]]

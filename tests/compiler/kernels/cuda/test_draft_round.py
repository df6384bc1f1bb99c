"""The kernels of rounds of drafts against their references: rows of any number and depth, limits, padding, NaN."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, FLOATS
from torch import Tensor

from optc.compiler.kernels.cuda.draft_round import accepts_choice, accepts_layout, accepts_verification
from optc.compiler.kernels.cuda.drafts.launch import accept_drafts_, choose_draft_, lay_out_drafts_
from optc.compiler.ops.library import reference

SIZE = 4


def state(batch: int, depth: int) -> list[Tensor]:
    """Heads, drafts of one more row and one more token, and tables that are part of wider ones."""
    generator = torch.Generator().manual_seed(batch + depth)

    def some(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    position = some(0, 9, batch)
    heads = torch.stack([some(0, 50, batch), position, position + some(0, depth + 3, batch), some(0, depth + 1, batch)])
    heads[1:, -1] = 0
    tables = some(0, 90, batch, 8).int()[:, :5]
    return [item.to(DEVICE) for item in (heads, some(0, 3, batch + 1, depth + 1), tables)]


@pytest.mark.parametrize(("batch", "depth"), [(1, 0), (1, 4), (5, 2), (3, 1)])
def test_rounds(batch: int, depth: int) -> None:
    count = depth + 1
    found = []
    for lay_out, accept in (
        (lay_out_drafts_, accept_drafts_),
        (reference("lay_out_drafts_"), reference("accept_drafts_")),
    ):
        heads, drafts, tables = state(batch, depth)
        inputs = torch.full((3, batch * count), -7, device=DEVICE)
        lengths = torch.full((batch * count + (depth > 0),), -7, dtype=torch.int32, device=DEVICE)
        picks, further = (
            torch.full((batch,), -7, device=DEVICE),
            torch.full((2, max(0, depth - 1), batch), -7, device=DEVICE),
        )
        behind = torch.full(further.shape[1:], -7, dtype=torch.int32, device=DEVICE)
        told = []
        for turn in range(3):
            lay_out(heads, drafts, tables, *inputs, lengths, block_size=SIZE)
            told += [inputs.tolist(), lengths.tolist()]
            decided = (inputs[0].roll(-1) + (torch.arange(batch * count, device=DEVICE) % 5 == turn)).contiguous()
            decided[-1] = -1
            outcome, ids = accept(decided, heads, drafts, tables, picks, *further, behind, block_size=SIZE, made=depth)
            told += [item.tolist() for item in (outcome, ids, heads, picks, further, behind)]
        found.append(told)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("batch", "size"), [(1, 3000), (3, 7)])
def test_choices(batch: int, size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(batch, size, generator=torch.Generator().manual_seed(size)).to(DEVICE, dtype)
    logits[-1, 3] = float("nan") if batch > 1 else 9.0
    targets = torch.arange(size, device=DEVICE) * 7 + 1
    drafts = [torch.full((batch + 1, 3), -7, device=DEVICE) for _ in range(2)]
    for _ in range(2):  # counters of the first call are as they were
        tokens = choose_draft_(logits, targets, drafts[0], place=2)
        expected = reference("choose_draft_")(logits, targets, drafts[1], place=2)
        assert tokens.tolist() == expected.tolist()
    assert drafts[0].tolist() == drafts[1].tolist()
    assert tokens[-1] == (1 if batch > 1 else 22)


def test_what_they_do_not_take() -> None:
    heads, drafts, tables = (item.cpu() for item in state(2, 1))
    inputs, lengths = torch.zeros((3, 4), dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    assert accepts_layout((heads, drafts, tables, *inputs, lengths), {}) is None
    assert accepts_layout((heads.T, drafts, tables, *inputs, lengths), {}) == "an input of the round is not contiguous"
    types = "tokens, positions and slots are int64, lengths and tables int32"
    assert accepts_layout((heads, drafts, tables.long(), *inputs, lengths), {}) == types
    assert accepts_layout((heads, drafts.int(), tables, *inputs, lengths), {}) == types
    rest = (heads, drafts, tables, torch.zeros(2, dtype=torch.int64), *torch.zeros((2, 0, 2), dtype=torch.int64))
    none = torch.zeros((0, 2), dtype=torch.int32)
    assert accepts_verification((inputs[0], *rest, none), {}) is None
    assert accepts_verification((inputs[0], *rest, none.long()), {}) == types
    neighbours = "what a row of a table holds are not neighbours"
    assert accepts_verification((inputs[0], heads, drafts, tables.T, *rest[3:], none), {}) == neighbours
    logits, targets = torch.zeros(2, 4), torch.arange(4)
    assert accepts_choice((logits, targets, drafts), {}) is None
    assert "float64" in str(accepts_choice((logits.double(), targets, drafts), {}))
    assert "neighbours" in str(accepts_choice((logits.T, targets, drafts), {}))

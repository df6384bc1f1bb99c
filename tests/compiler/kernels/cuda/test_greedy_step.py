"""greedy_step_ and advance_step_ against their references: ties, NaN, infinities, padding, rows of many sizes."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, FLOATS
from torch import Tensor

from optc.compiler.kernels.cuda.greedy.launch import advance_step_, greedy_step_
from optc.compiler.kernels.cuda.greedy_step import accepts, accepts_tokens
from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.compiler.ops.library import reference


def state(batch: int) -> list[Tensor]:
    """Inputs of a step; the second row is padding, the third about to begin a block."""
    ids = torch.arange(batch)
    positions = torch.full((batch,), 2)
    slots = torch.arange(batch) * 8 + 2
    if batch > 2:
        slots[1], positions[2], slots[2] = -1, 3, 19
    tables = torch.arange(batch * 3, dtype=torch.int32).flip(0).reshape(batch, 3)
    return [item.to(DEVICE) for item in (ids, positions, slots, (positions + 1).int(), tables)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("batch", "size"), [(1, 3000), (1, 7), (5, 1025), (3, 1024)])
def test_it_computes_what_the_reference_does(batch: int, size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(batch, size, generator=torch.Generator().manual_seed(size)).to(DEVICE, dtype)
    logits[0, size // 3] = logits[0, -1] = 9.0
    if batch > 2:
        logits[2, 4], logits[-1, 5] = float("nan"), float("inf")
    logits = torch.cat([logits, logits], 1)[:, :size]  # rows apart
    ours, theirs = state(batch), state(batch)
    for _ in range(2):  # counters of the first call are as they were
        found = greedy_step_(logits, *ours, block_size=4)
        expected = reference("greedy_step_")(logits, *theirs, block_size=4)
        assert found.tolist() == expected.tolist()
        assert [item.tolist() for item in ours] == [item.tolist() for item in theirs]
    assert found[0] == size // 3
    if batch > 2:
        assert found[2] == found[-1] == -1


@pytest.mark.parametrize("batch", [1, 5])
def test_tokens_that_were_chosen_before(batch: int) -> None:
    tokens = torch.arange(batch, device=DEVICE) * 1000 + 7
    tokens[-1] = NO_TOKEN
    ours, theirs = state(batch), state(batch)
    for _ in range(2):
        advance_step_(tokens, *ours, block_size=4)
        reference("advance_step_")(tokens, *theirs, block_size=4)
        assert [item.tolist() for item in ours] == [item.tolist() for item in theirs]
    ids, positions = ours[0].tolist(), ours[1].tolist()
    assert (ids[-1], positions[-1]) == (0, 4)
    if batch > 2:
        assert (ids[1], positions[1]) == (1, 2), "padding stays"


def test_what_it_does_not_take() -> None:
    logits, inputs = torch.zeros(2, 4), [item.cpu() for item in state(2)]
    assert accepts((logits, *inputs), {}) is None
    assert accepts((logits.t(), *inputs), {}) == "the logits of a token are not neighbours"
    assert "float64" in str(accepts((logits.double(), *inputs), {}))
    assert accepts((logits, *inputs[:4], inputs[4][:, :2]), {}) == "an input of the step is not contiguous"
    odd = [inputs[0].int(), *inputs[1:]]
    assert accepts((logits, *odd), {}) == "ids, positions and slots are int64, lengths and tables int32"
    tokens = torch.zeros(2, dtype=torch.int64)
    assert accepts_tokens((tokens, *inputs), {}) is None
    assert accepts_tokens((tokens, *odd), {}) == "ids, positions and slots are int64, lengths and tables int32"
    assert accepts_tokens((torch.zeros(4, dtype=torch.int64)[::2], *inputs), {}) == "the tokens are not neighbours"
    assert accepts_tokens((tokens.int(), *inputs), {}) == "tokens of type int32; the kernel takes int64"

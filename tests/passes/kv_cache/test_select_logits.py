"""select-logits: the head sees the rows that are asked for, in the order in which they are asked for."""

from __future__ import annotations

import functools

import pytest
import torch
from rewrites import rewritten, stirred
from stages import apply
from torch import Tensor

from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.select_logits import SelectLogits


@functools.cache
def paged(name: str) -> Program:
    return apply(PageKVCache(), stirred(name)).program


def inputs(program: Program, tokens: int) -> list[Tensor]:
    """A prefill of one request into two blocks, and zeroed pools."""
    pools = [spec.dims for spec in program.contract.inputs if spec.role in ("key_cache", "value_cache")]
    ids = torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(0))
    lengths, starts = torch.tensor([tokens], dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    place = torch.arange(tokens)
    zeros = [torch.zeros([2 if size == "num_blocks" else int(size) for size in dims]) for dims in pools]
    return [ids, place, (place + 16) % 32, table, lengths, starts, *zeros]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rows_are_those_of_the_whole(name: str) -> None:
    program = paged(name)
    result = rewritten(SelectLogits(), program)
    assert (result.matched, result.candidates) == (1, 1)
    given = inputs(program, 19)
    whole = program(*given)
    for rows in ([18], [3, 0, 18, 3]):
        indices = torch.tensor(rows)
        selected = result.program(*given[:6], indices, *given[6:])
        assert selected.shape == (len(rows), 128)
        assert float((selected - whole[indices]).abs().max()) <= 1e-5


def test_the_contract_names_the_input() -> None:
    contract = rewritten(SelectLogits(), paged("llama")).program.contract
    assert contract.input_index("logits_indices") == 6
    assert contract.inputs[6].dims == ("rows",)


def test_once_is_enough() -> None:
    result = SelectLogits().run(rewritten(SelectLogits(), paged("llama")).program, PassContext())
    assert [miss.reason for miss in result.misses] == ["its rows are selected already"]


def test_it_is_for_paged_programs() -> None:
    result = SelectLogits().run(stirred("llama"), PassContext())
    assert (result.matched, result.candidates) == (0, 0)

"""page-kv-cache with select_logits: the head sees the rows that are asked for, in the order in which they are asked for.

The rows of linear caches: test_static.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from rewrites import rewritten, stirred
from stages import apply, one_request
from torch import Tensor

from optc.compiler.analysis.norms import norm_call
from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program
from optc.passes.fusion.norm import FuseNorm
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.selecting import by_row

SELECTING = PageKVCache(select_logits=True)


@functools.cache
def paged(name: str) -> Program:
    return apply(PageKVCache(), stirred(name)).program


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rows_are_those_of_the_whole(name: str) -> None:
    program, result = paged(name), rewritten(SELECTING, stirred(name))
    assert (result.matched, result.candidates, result.notes) == (2, 2, ())
    given = one_request(program, 19)
    whole = program(*given)
    for rows in ([18], [3, 0, 18, 3]):
        indices = torch.tensor(rows)
        selected = result.program(*given[:6], indices, *given[6:])
        assert selected.shape == (len(rows), 128)
        assert float((selected - whole[indices]).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt2", "opt", "gpt-neox", "granite"])
def test_the_last_norm_is_of_the_rows(name: str) -> None:
    """Every form of head; that the norm of every family is behind the selection, test_decode.py says."""
    fused = apply(FuseNorm(), stirred(name)).program
    program, result = apply(PageKVCache(), fused).program, rewritten(SELECTING, fused)
    (selection,) = result.program.calls(torch.ops.aten.index_select.default)
    assert [norm_call(node) is not None for node in selection.users] == [True]
    given, indices = one_request(program, 19), torch.tensor([3, 0, 18, 3])
    whole = program(*given)
    selected = result.program(*given[:6], indices, *given[6:])
    assert float((selected - whole[indices]).abs().max()) <= 1e-5 * float(whole.abs().max())


class _Head(torch.nn.Module):
    """A head behind a norm that is read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = torch.nn.Embedding(8, 16), torch.nn.RMSNorm(16), torch.nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        normed = self.norm(self.embed(ids))
        return self.head(normed) + normed[..., :8]


def test_a_norm_that_others_read_stays_whole() -> None:
    program = capture_module(_Head().eval(), (torch.zeros((1, 5), dtype=torch.long),))
    (head,) = program.calls(torch.ops.aten.linear.default)
    assert by_row(head) == [head]


def test_the_contract_names_the_input() -> None:
    contract = rewritten(SELECTING, stirred("llama")).program.contract
    assert contract.input_index("logits_indices") == 6
    assert contract.inputs[6].dims == ("rows",)

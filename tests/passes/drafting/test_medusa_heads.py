"""add-medusa-heads: the likeliest tokens of each head, computed by hand of what the model's head reads; logits stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from medusa_heads import write_heads
from stages import apply, captured, one_request, rewritten
from torch import Tensor
from torch.nn import functional

from optc.compiler.diagnostics import InputError, NoMatchError
from optc.compiler.ir.contract import Output
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.medusa import MedusaFolder
from optc.compiler.pipeline.pipeline import Pipeline
from optc.passes.drafting.expose_hidden import ExposeHidden
from optc.passes.drafting.medusa_heads import AddMedusaHeads
from optc.passes.kv_cache.paged import PageKVCache

TOKENS = 19


def guesses(heads: MedusaFolder, hidden: Tensor, table: Tensor) -> Tensor:
    """int64 [n, heads], of hidden states [n, C] and the model's own head [V, C]."""
    found = []
    for head in heads.heads:
        x = hidden
        for weight, bias in head.blocks:
            x = x + functional.silu(x @ weight.T + bias)
        found.append((x @ (table if head.linear is None else head.linear).T).argmax(-1))
    return torch.stack(found, 1)


def table_of(program: Program) -> Tensor:
    """The model's own head: the last weight that multiplies."""
    (last,) = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default][-1:]
    name = program.weight_of(last.args[1])
    assert name is not None
    return program.weight(name)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_tokens_are_those_of_the_heads(family: str, own: bool, tmp_path: Path) -> None:
    heads = write_heads(tmp_path / "heads", 64, heads=3, layers=2, vocabulary=128 if own else None)
    program = rewritten(PageKVCache(), family).program
    result = apply(AddMedusaHeads(folder=str(tmp_path / "heads")), program)
    assert (result.matched, result.candidates, result.misses) == (1, 1, ())
    assert result.program.contract.outputs[1] == Output(name="drafted", role="drafted", columns=3)
    given = one_request(program, TOKENS)
    logits, drafted = result.program(*given)
    assert torch.equal(logits, program(*given))
    hidden = apply(ExposeHidden(), program).program(*given)[1]
    expected = guesses(heads, hidden, table_of(program))
    assert (drafted.dtype, drafted.shape) == (torch.int64, (TOKENS, 3))
    assert torch.equal(drafted, expected)
    assert len(expected.unique()) > 8


def test_rows_are_those_of_the_logits(tmp_path: Path) -> None:
    heads = write_heads(tmp_path / "heads", 64)
    program = rewritten(PageKVCache(select_logits=True), "llama").program
    selecting = apply(AddMedusaHeads(folder=str(tmp_path / "heads")), program).program
    given, rows = one_request(program, TOKENS), torch.tensor([3, 0, 18])
    drafted = selecting(*given[:6], rows, *given[6:])[1]
    whole = rewritten(PageKVCache(), "llama").program
    hidden = apply(ExposeHidden(), whole).program(*one_request(whole, TOKENS))[1]
    assert torch.equal(drafted, guesses(heads, hidden, table_of(whole))[rows])


def test_the_stage_is_run_and_gated(tmp_path: Path) -> None:
    write_heads(tmp_path, 64, weights="1" * 64)
    result = Pipeline([PageKVCache(), AddMedusaHeads(folder=str(tmp_path))]).run(captured("llama"))
    assert result.records[1].drift is not None
    assert result.records[1].drift.max_abs_diff == 0.0
    assert result.records[1].notes == ()


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    program = rewritten(PageKVCache(), "llama").program
    write_heads(tmp_path / "narrow", 32)
    with pytest.raises(InputError, match="hidden size of 32, this one has 64"):
        apply(AddMedusaHeads(folder=str(tmp_path / "narrow")), program)
    write_heads(tmp_path / "other", 64, vocabulary=100)
    with pytest.raises(InputError, match="vocabulary of 100, this one has 128"):
        apply(AddMedusaHeads(folder=str(tmp_path / "other")), program)
    write_heads(tmp_path / "fits", 64)
    rewrite = AddMedusaHeads(folder=str(tmp_path / "fits"))
    assert "does not say which weights" in apply(rewrite, program).notes[0]
    with pytest.raises(NoMatchError, match="page-kv-cache comes first"):
        Pipeline([rewrite]).run(captured("llama"))
    with pytest.raises(NoMatchError, match="the program has heads"):
        Pipeline([PageKVCache(), rewrite, rewrite]).run(captured("llama"))

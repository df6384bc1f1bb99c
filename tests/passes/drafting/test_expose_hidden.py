"""expose-hidden: the hidden states that the model itself says it has, at the positions of the logits, which stay."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from families import make_model
from stages import VOCAB, apply, captured, one_request, rewritten
from torch import Tensor

from optc.compiler.analysis.bottlenecks import layer_inputs
from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import NoMatchError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.contract import Output
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.pipeline import Pipeline
from optc.compiler.rewriting.passes import PassResult
from optc.passes.drafting.expose_hidden import ExposeHidden
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.sessions.step_graph import without_selection

FAMILIES = ["llama", "gpt2", "qwen3", "gemma2", "phi", "opt"]
TOKENS = 19
ALL = ExposeHidden(layers=(1, 0))


@functools.cache
def exposed(family: str, select: bool) -> tuple[Program, PassResult]:
    program = rewritten(PageKVCache(select_logits=select), family).program
    return program, apply(ALL, program)


def said(family: str, tokens: Tensor) -> list[Tensor]:
    """Hidden states [n, C] of the model: in front of each layer, and behind the last norm."""
    states: Any = make_model(family)(tokens[None], output_hidden_states=True).hidden_states
    return [state[0] for state in states]


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_models_own(family: str) -> None:
    program, result = exposed(family, select=False)
    assert (result.matched, result.candidates, result.misses) == (3, 3, ())
    given = one_request(program, TOKENS)
    logits, hidden, aux = result.program(*given)
    assert torch.equal(logits, program(*given))
    first, second, last = said(family, given[0])
    assert float((hidden - last).abs().max()) < 1e-4
    assert float((aux - torch.cat([second, first], -1)).abs().max()) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_are_those_of_the_logits_and_of_all_tokens(family: str) -> None:
    """What Medusa's heads read is selected with the logits; what a draft model reads is of every token."""
    _, whole = exposed(family, select=False)
    program, result = exposed(family, select=True)
    given, rows = one_request(program, TOKENS)[:], torch.tensor([3, 0, 18, 3])
    plain = one_request(whole.program, TOKENS)
    selected = result.program(*given[:6], rows, *given[6:])
    expected = whole.program(*plain)
    for part, all_rows in zip(selected[:2], expected[:2], strict=True):
        assert float((part - all_rows[rows]).abs().max()) < 1e-5
    assert float((selected[2] - expected[2]).abs().max()) < 1e-5
    everything = without_selection(result.program)(*given[:6], torch.arange(TOKENS), *given[6:])
    assert [len(part) for part in everything] == [TOKENS] * 3


def test_contract_and_saving(tmp_path: Path) -> None:
    program, result = exposed("llama", select=True)
    assert [(spec.name, spec.role) for spec in result.program.contract.outputs] == [
        ("logits", "logits"),
        ("hidden", "hidden"),
        ("aux_hidden", "aux_hidden"),
    ]
    result.program.save(tmp_path)
    found = Program.load(tmp_path)
    given = one_request(program, TOKENS)
    inputs = (*given[:6], torch.tensor([5]), *given[6:])
    assert all(map(torch.equal, found(*inputs), result.program(*inputs)))
    assert [part.shape[1] for part in found(*inputs)] == [128, 64, 128]


def test_the_stage_is_run_and_gated() -> None:
    result = Pipeline([PageKVCache(), ExposeHidden(layers=(-1,))]).run(captured("llama"))
    assert [record.matched for record in result.records] == [2, 2]
    assert result.records[1].drift is not None
    assert result.records[1].drift.max_abs_diff == 0.0
    run = run_stage(result.program, [[5, 6, 7], [8] * 11])
    assert [row.shape for row in run.logits] == [(3, 128), (11, 128)]


def test_one_layer_alone() -> None:
    program = rewritten(PageKVCache(), "llama").program
    given = one_request(program, TOKENS)
    _, aux = apply(ExposeHidden(final=False, layers=(-1,)), program).program(*given)
    assert torch.equal(aux, exposed("llama", select=False)[1].program(*given)[2][:, :64])


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(NoMatchError, match="layer 2: the program has 2"):
        Pipeline([PageKVCache(), ExposeHidden(layers=(0, 2))]).run(captured("llama"))
    with pytest.raises(NoMatchError, match="page-kv-cache comes first"):
        Pipeline([ExposeHidden()]).run(captured("llama"))
    with pytest.raises(NoMatchError, match="the program gives hidden, logits"):
        Pipeline([PageKVCache(), ExposeHidden(), ExposeHidden()]).run(captured("llama"))


class _Twice(torch.nn.Module):
    """Two attentions of one head of 8, side by side over the same embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * 2.0
        y, z = x[:, None], -x[:, None]
        first = torch.ops.optc.attention(y, y, y, None, None, scale=1.0, causal=True, window=0, softcap=0.0)
        second = torch.ops.optc.attention(z, z, z, None, None, scale=1.0, causal=True, window=0, softcap=0.0)
        return self.head(first[:, 0] + second[:, 0])


def test_layers_side_by_side_have_one_input() -> None:
    """The first layer's is the scaled embedding, in front of both; nothing leads from the first to the second."""
    program = capture_module(_Twice().eval(), (torch.zeros((2, 5), dtype=torch.long),), input_names=("input_ids",))
    spec = msgspec.structs.replace(program.contract.inputs[0], role="input_ids")
    program = program.with_contract(inputs=(spec,), outputs=(Output(name="logits", role="logits"),))
    first, second = layer_inputs(program)
    assert first is not None
    assert second is None
    assert (first.target, first.args[1]) == (torch.ops.aten.mul.Tensor, 2.0)

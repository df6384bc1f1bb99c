"""Rows that a model selects by what the data say are computed for all rows: the same numbers, in sizes that are known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor
from torch.export import Dim

from optc.compiler.capture import capture_model, selections
from optc.compiler.diagnostics import CaptureError
from optc.compiler.ir.deferred import has_data_sizes
from optc.compiler.ir.export import run_export

sys.path.insert(0, str(ROOT / "benchmarks"))
from zoo_models import Kind, build


class _Rows(torch.nn.Module):
    """A forward of a function of x [N, 8] and a few weights."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.experts = torch.nn.Parameter(torch.randn(3, 8, 8))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _written(m: Any, x: Tensor) -> Tensor:
    """As X-MOD's adapters: each part of the rows through a layer of its own."""
    out, mask = torch.zeros_like(x), x[:, 0] > 0
    out[mask] = m.first(x[mask])
    out[~mask] = m.second(x[~mask])
    return out


def _added(m: Any, x: Tensor) -> Tensor:
    """As Higgs Audio's norms: rows are put back by masked_scatter, and added in place."""
    x, mask = x.clone(), x[:, 0] > 0
    x = x.masked_scatter(mask[:, None].expand(x.shape), m.first(x[mask]))
    x[~mask] += m.second(x[~mask])
    return x


def _hit(m: Any, x: Tensor) -> Tensor:
    """As DBRX's experts: a loop over those that were hit. One class more than there are experts is never."""
    weights, chosen = x[:, :3].softmax(-1).topk(2, -1)
    mask = torch.nn.functional.one_hot(chosen, 4).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for place in torch.greater(mask.sum((-1, -2)), 0).nonzero():
        expert = place[0]
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, (x[token] @ m.experts[expert]) * weights[token, slot, None])
    return out


def _counted(m: Any, x: Tensor) -> Tensor:
    """As JetMoE's experts: rows are sorted, and each expert gets as many as were counted."""
    chosen = x[:, :3].argmax(-1)
    counts = torch.nn.functional.one_hot(chosen, 3).sum(0).tolist()
    order = chosen.argsort(stable=True)
    pieces = x[order].split(counts, dim=0)
    made = torch.cat([piece @ m.experts[i] for i, piece in enumerate(pieces)], 0)
    return torch.zeros_like(x).index_add(0, order, made)


@pytest.mark.parametrize("function", [_written, _added, _hit, _counted])
def test_all_rows_are_computed(function: Callable[[Any, Tensor], Tensor]) -> None:
    module = _Rows(function)
    dims = ({0: Dim("rows", min=1, max=64)},)
    with selections.whole_selections(module):
        exported = run_export(module, (torch.randn(7, 8),), dims, where="here")
    assert not has_data_sizes(exported)
    for rows in (1, 5, 33):
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_a_model_with_such_experts_is_captured() -> None:
    program = capture_model(build(Kind("causal", "dbrx", "DbrxForCausalLM")))
    assert program.proof is not None
    assert program.proof.proved
    assert "are computed for all rows" in "; ".join(program.proof.notes)


def test_what_computes_with_the_selected_rows_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over the rows of one expert is another over all rows: the proof notices, and the first reason is told."""
    model = build(Kind("causal", "dbrx", "DbrxForCausalLM"))
    mlp = type(model.transformer.blocks[0].ffn.experts.mlp)
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x, *rest: own(self, x - x.mean(0, keepdim=True), *rest))
    with pytest.raises(CaptureError, match=r"torch\.export failed"):
        capture_model(model)

"""Rows behind views: any op that keeps the order of elements, where the last axis stays."""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.analysis.rows import same_elements, same_rows
from optc.compiler.capture import capture_module


class _Views(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept = x.unflatten(0, (2, 3)).unsqueeze(0).flatten(0, 1).view(3, 2, 8)
        return kept, x.view(12, 4), x.t().reshape(6, 8)


def test_rows_behind_views() -> None:
    program = capture_module(_Views(), (torch.randn(6, 8),))
    (x,) = (node for node in program.graph.nodes if node.op == "placeholder")
    kept, cut, turned = program.graph.output_node().args[0]
    assert same_rows(kept) is x
    assert same_rows(cut) is cut
    assert same_rows(turned) is not x
    assert [same_elements(node) is x for node in (kept, cut, turned)] == [True, True, False]

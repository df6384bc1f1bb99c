"""What a decode step launches: views are none, copies and calls that write their arguments are."""

from __future__ import annotations

import torch
from rewrites import stirred
from stages import apply
from torch import Tensor

from optc.compiler.analysis.decode_launches import decode_launches
from optc.compiler.capture import capture_module
from optc.passes.kv_cache.paged import PageKVCache


class _Calls(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.view(2, 3, 4).transpose(1, 2)
        rows = wide.reshape(2, 12)
        same = torch.nn.functional.dropout(rows.contiguous().to(torch.float32), 0.5, False)
        left, right = same.chunk(2, -1)
        return (left.contiguous() + right).add_(1.0)


def test_views_are_not_counted() -> None:
    program = capture_module(_Calls(), (torch.randn(6, 4),))
    found = decode_launches(program)
    assert found.step == found.layer
    assert found.counts() == {"aten.reshape": 1, "aten.contiguous": 1, "aten.add": 1, "aten.add_": 1}


def test_a_layer_is_from_one_attention_to_the_next() -> None:
    program = apply(PageKVCache(), stirred("gpt2")).program
    found = decode_launches(program)
    assert found.counts()["optc.paged_attention_"] == 1
    assert found.counts()["aten.addmm"] == 4
    assert str(found).startswith(f"a decode step of one token computes {len(found.step)} calls, {len(found.layer)} in")

"""Conditions on sizes that torch cannot decide are held to every size, or name one that breaks them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from optc.compiler.diagnostics import CaptureError
from optc.compiler.ir.export import SizeConditionError, run_export


class _Cut(nn.Module):
    """A table of 16 rows cut to the length: torch makes a special case of the whole table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        return torch.where(self.table[:, :, :size, :size] > 0, x[:, None, :, None], 0.0)


def _export(most: int) -> torch.export.ExportedProgram:
    return run_export(_Cut(), (torch.randn(2, 5),), ({1: Dim("seq", min=1, max=most)},), where="here")


def test_conditions_that_hold_are_taken_out() -> None:
    exported = _export(15)
    assert not [node for node in exported.graph.nodes if "assert_scalar" in str(node.target)]
    x = torch.randn(2, 15)
    assert torch.equal(exported.module()(x), _Cut.forward(exported.module(), x))


def test_a_size_that_breaks_one_is_named() -> None:
    with pytest.raises(CaptureError) as caught:
        _export(16)
    assert caught.value.__cause__ is not None
    condition = caught.value.__cause__.__cause__
    assert isinstance(condition, SizeConditionError)
    assert list(condition.sizes.values()) == [16]

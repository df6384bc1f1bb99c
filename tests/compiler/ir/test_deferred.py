"""Conditions on sizes that torch cannot decide are held to every size, or name one that breaks them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from optc.compiler.diagnostics import CaptureError
from optc.compiler.ir.deferred import SingleSizes
from optc.compiler.ir.export import SizeConditionError, functional_export, run_export


class _Cut(nn.Module):
    """A table of 16 rows cut to the length: torch makes a special case of the whole table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        return torch.where(self.table[:, :, :size, :size] > 0, x[:, None, :, None], 0.0)


def _export(most: int, excepted: SingleSizes | None = None) -> torch.export.ExportedProgram:
    dims = ({1: Dim("seq", min=1, max=most)},)
    return run_export(_Cut(), (torch.randn(2, 5),), dims, where="here", excepted=excepted)


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


def test_single_sizes_are_left_to_who_runs_them() -> None:
    excepted = SingleSizes(16)
    exported = _export(16, excepted)
    assert list(excepted.found.values()) == [{16}]
    x = torch.randn(2, 16)
    assert torch.equal(exported.module()(x), _Cut.forward(exported.module(), x))
    with pytest.raises(CaptureError):
        _export(16, SingleSizes(15))


@pytest.mark.parametrize(
    "failures",
    [
        [("s != t", {"s": 2, "t": 2})],  # a pair of sizes
        [("s > 8", {"s": size}) for size in range(1, 6)],  # no single ones
        [("s > 8", {})],
    ],
)
def test_other_failures_are_not_single_sizes(failures: list[tuple[str, dict[str, int]]]) -> None:
    excepted = SingleSizes(16)
    assert not excepted.take(failures)
    assert excepted.found == {}


class _Checked(nn.Module):
    """Asserts something of its data, as XLM does of the lengths of its rows, and writes in place."""

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.argmax().item() <= 1000)
        return x.clone().mul_(2)


def test_what_a_model_asserts_of_its_data_is_left_out() -> None:
    """Such a number has no bounds, which functionalization met with an AttributeError of sympy's."""
    exported = run_export(_Checked(), (torch.randn(2, 5),), ({1: Dim("seq", min=1, max=9)},), where="here")
    exported.graph.eliminate_dead_code()
    functional = functional_export(exported)
    for program in (exported, functional):
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert not [name for name in names if "assert" in name or "item" in name or "argmax" in name]
    x = torch.randn(2, 7)
    assert torch.equal(functional.module()(x), x * 2)


class _Printing(nn.Module):
    """Prints its data, as I-BERT's modules do; torch 2.11 prints modules while it traces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("most", torch.tensor(1.5))

    def __repr__(self) -> str:
        return f"_Printing({self.most.item():.2f})"

    def forward(self, x: Tensor) -> Tensor:
        assert repr(self)
        return x * self.most


def test_modules_are_printed_without_their_data() -> None:
    module = _Printing()
    exported = run_export(module, (torch.randn(2, 5),), ({1: Dim("seq", min=1, max=9)},), where="here")
    assert len(exported.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)) == 1
    assert repr(module) == "_Printing(1.50)"

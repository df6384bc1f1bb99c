"""The table of a program's weights: right after every edit, and made once, not once per question."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export.graph_signature import InputSpec

from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, drop_dead, replace_call
from optc.compiler.rewriting.passes import PassContext
from optc.passes.quantization.rtn import QuantizeRtn


def linears(count: int) -> Program:
    torch.manual_seed(0)
    return capture_module(
        nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)]).requires_grad_(False), (torch.randn(2, 8),)
    )


def names(program: Program) -> dict[str, str]:
    """The table as the signature has it."""
    specs = program.exported.graph_signature.input_specs
    return {spec.arg.name: spec.target for spec in specs if spec.target is not None}


def test_table_follows_edits() -> None:
    """A weight that is added is known, one that nothing reads is gone, and clones do not see each other's."""
    program = linears(2)
    before = names(program)
    edited = program.clone()
    assert dict(edited.weight_names()) == before
    first, second = (add_weight(edited, f"made.{i}", torch.ones(8, 8)) for i in range(2))
    assert [edited.weight_of(node) for node in (first, second)] == ["made.0", "made.1"]
    assert dict(edited.weight_names()) == names(edited)
    linear = edited.calls(torch.ops.aten.linear.default)[0]
    replace_call(edited, linear, torch.ops.aten.linear.default, (linear.args[0], second, linear.args[2]))
    renamed = edited.with_contract(passes=("edited",))
    drop_dead(renamed)  # another view of the same graph: both know what is gone
    for view in (edited, renamed):
        assert dict(view.weight_names()) == names(edited)
        assert sorted(view.weight_names().values()) == ["0.bias", "1.bias", "1.weight", "made.1"]
    x = torch.randn(3, 8)
    expected = nn.functional.linear(
        x.sum(-1, keepdim=True).expand(3, 8) + program.weight("0.bias"),
        program.weight("1.weight"),
        program.weight("1.bias"),
    )
    torch.testing.assert_close(edited.changed()(x[:2]), expected[:2])
    assert dict(program.weight_names()) == before


def test_first_weight_of_a_program_without_any() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    program = capture_module(Plain(), (torch.ones(2, 2),))
    assert dict(program.weight_names()) == {}
    edited = program.clone()
    made = add_weight(edited, "factor", torch.full((2, 2), 3.0))
    call = edited.calls(torch.ops.aten.mul.Tensor)[0]
    replace_call(edited, call, torch.ops.aten.mul.Tensor, (call.args[0], made))
    assert torch.equal(edited.changed()(torch.ones(2, 2)), torch.full((2, 2), 3.0))


def test_quantizing_is_linear_in_the_number_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the linears read the signature's entries four times as often, not sixteen times."""
    reads = 0

    def counted(spec: InputSpec, name: str) -> object:
        nonlocal reads
        reads += name == "kind"
        return object.__getattribute__(spec, name)

    programs = [linears(count) for count in (8, 16, 32)]
    counts = []
    with monkeypatch.context() as patch:
        patch.setattr(InputSpec, "__getattribute__", counted)
        for program in programs:
            reads = 0
            QuantizeRtn(bits=4, group_size=8).run(program, PassContext())
            counts.append(reads)
    assert counts[0] > 0
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])

"""One call replaced by the graph of a Python function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optc.compiler.capture import capture_module
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.rewriting.inlining import inline_call

aten = torch.ops.aten


class _Net(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.logaddexp(x * 2, y)


def test_a_call_becomes_a_graph() -> None:
    """Shapes stay symbolic, source lines stay, the program's output follows."""
    program = capture_module(
        _Net(),
        (torch.randn(3, 4), torch.randn(3, 4)),
        dynamic={"input_0": {0: "rows"}, "input_1": {0: "rows"}},
    )
    (node,) = program.calls(aten.logaddexp.default)
    trace = node.meta["stack_trace"]

    def spelled(a: Tensor, b: Tensor) -> Tensor:
        top = torch.maximum(a, b)
        return top + torch.log(torch.exp(a - top) + torch.exp(b - top)).view(a.shape[0], -1)

    result = inline_call(program, node, spelled)
    drop_dead(program)
    program.changed()
    assert not program.calls(aten.logaddexp.default)
    assert str(result.meta["val"].shape[0]).startswith("s")
    assert {item.meta["stack_trace"] for item in program.calls(aten.exp.default)} == {trace}
    for rows in (1, 3, 9):
        x, y = torch.randn(rows, 4), torch.randn(rows, 4)
        torch.testing.assert_close(program(x, y), torch.logaddexp(2 * x, y))


def test_extra_values_come_first() -> None:
    program = capture_module(_Net(), (torch.randn(4), torch.randn(4)))
    (node,) = program.calls(aten.logaddexp.default)
    (product,) = program.calls(aten.mul.Tensor)
    inline_call(program, node, lambda extra, a, b: extra - b, product)
    drop_dead(program)
    x, y = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(program.changed()(x, y), 2 * x - y)

"""Equal calls become one, unless a write, chance or the order of reads stands between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.rewriting.common_subexpressions import share_expressions

aten = torch.ops.aten


class _Repeats(nn.Module):
    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        twice = (x * 2).sin(), (x * 2).sin()
        before = cache[:1] + 1
        cache.add_(1)
        after = cache[:1] + 1
        zeros = torch.zeros(2), torch.zeros(2)
        zeros[0].view(2).add_(3)
        noise = torch.rand_like(x), torch.rand_like(x)
        return (*twice, before, after, *zeros, *noise)


def _program() -> Program:
    return capture_module(_Repeats(), (torch.ones(3), torch.ones(3)))


def _outputs(program: Program) -> list[Any]:
    return list(program(torch.arange(3.0), torch.zeros(3)))


def test_what_may_be_shared_is() -> None:
    program = _program()
    assert len(program.calls(aten.sin.default)) == 2
    assert share_expressions(program) == 2  # the product and the sine
    drop_dead(program)
    program.changed()
    assert len(program.calls(aten.sin.default)) == len(program.calls(aten.mul.Tensor)) == 1


def test_writes_and_chance_keep_calls_apart() -> None:
    program = _program()
    share_expressions(program)
    drop_dead(program)
    twice, again, before, after, written, untouched, noise, other = _outputs(program.changed())
    torch.testing.assert_close(twice, torch.sin(2 * torch.arange(3.0)))
    torch.testing.assert_close(again, twice)
    assert (before.tolist(), after.tolist()) == ([1.0], [2.0])
    assert (written.tolist(), untouched.tolist()) == ([3.0, 3.0], [0.0, 0.0])
    assert not torch.equal(noise, other)

"""Programs without in-place operators, and operators that a target lacks, against the module itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import NoMatchError
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import obstacle
from optc.passes.legalization.decompose import Decompose
from optc.passes.legalization.functionalize import Functionalize
from optc.targets.onnx_cpu import TARGET

_aten = torch.ops.aten
_ONNX = PassContext(obstacle=partial(obstacle, TARGET.legal))


class _Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _captured(function: Callable[[Tensor], Any], x: Tensor) -> Program:
    return capture_module(_Calls(function), (x,), dynamic={"input_0": {0: "rows"}})


def _writing(program: Program) -> list[str]:
    return [
        str(node.target)
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


def _slices(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3] = 0
    y[:, ::2] += 1
    y[x > 1] = 5
    view = y[:, 0]
    y[:, -1] = x[:, 0]
    return y + view.fill_(3)[:, None]


def _chain(x: Tensor) -> Tensor:
    y = functional.hardswish(x * 2, inplace=True)
    return functional.dropout(functional.elu(y.t(), inplace=True), 0.1, training=False, inplace=True)


def _input(x: Tensor) -> Tensor:
    return functional.relu(x, inplace=True) + 1


@pytest.mark.parametrize("function", [_slices, _chain, _input])
def test_programs_without_memory_compute_the_same(function: Callable[[Tensor], Tensor]) -> None:
    program = _captured(function, torch.randn(3, 6))
    assert _writing(program)
    result = Functionalize().run(program, _ONNX)
    assert result.matched == result.candidates > 0
    assert not _writing(result.program)
    for rows in (3, 1, 5):
        x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(result.program(x.clone()), function(x.clone()), rtol=0, atol=0)


def test_an_input_that_is_written_is_left_alone() -> None:
    program = _captured(_input, torch.randn(3, 6))
    result = Functionalize().run(program, _ONNX)
    assert result.notes == ("the module writes into its inputs (x), the artifact does not",)
    x = torch.full((2, 6), -1.0)
    result.program(x)
    assert bool((x == -1).all())


def test_what_the_target_can_run_stays() -> None:
    program = _captured(lambda x: functional.relu(x * 2, inplace=True), torch.randn(3, 6))
    assert Functionalize().run(program, _ONNX).matched == 0
    assert Functionalize().run(program, PassContext()).matched == 1  # any engine at all


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.seen


def test_a_state_is_not_dropped() -> None:
    program = capture_module(_Counts(), (torch.ones(2),))
    with pytest.raises(NoMatchError, match="writes into this buffer, which its next call reads"):
        Pipeline([Functionalize()]).run(program, PipelineOptions(context=_ONNX))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.roll((1, 2), (1, 2)),
        lambda x: functional.pixel_shuffle(x, 2).swapaxes(1, 2),
        lambda x: functional.normalize(x, dim=1) + torch.linalg.vector_norm(x, dim=1, keepdim=True),
        lambda x: functional.adaptive_avg_pool2d(x, (3, 5)),
        lambda x: functional.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=True),
        lambda x: functional.logsigmoid(functional.celu(x)) + x.aminmax(dim=1, keepdim=True)[1],
        lambda x: x.std((2, 3)),
    ],
)
def test_decompositions_compute_the_same(function: Callable[[Tensor], Tensor]) -> None:
    result = Decompose().run(_captured(function, torch.randn(3, 4, 6, 6)), _ONNX)
    assert not result.misses
    left = [node for node in result.program.graph.nodes if node.op == "call_function"]
    assert [obstacle(TARGET.legal, node) for node in left] == [None] * len(left)
    for rows in (2, 1):
        x = torch.randn(rows, 4, 6, 6, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(result.program(x), function(x), rtol=1e-5, atol=1e-6)


def test_a_decomposition_that_depends_on_an_open_size_is_left() -> None:
    x = torch.randn(3, 4, 6, 7)
    program = capture_module(
        _Calls(lambda x: torch.ops.aten._adaptive_avg_pool2d(x, [5, 7])), (x,), dynamic={"input_0": {2: "length"}}
    )
    result = Decompose().run(program, _ONNX)
    assert result.matched == 0
    assert "depends on sizes" in result.misses[0].reason


def test_without_a_target_everything_becomes_core_aten() -> None:
    program = _captured(lambda x: functional.celu(x.swapaxes(0, 1)), torch.randn(3, 4))
    result = Decompose().run(program, PassContext())
    targets = [node.target for node in result.program.graph.nodes if node.op == "call_function"]
    assert all(torch.Tag.core in target.tags for target in targets)

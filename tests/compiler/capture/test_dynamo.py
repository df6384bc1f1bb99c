"""Graphs of torch.compile as Programs: no compiled code runs here, the backend of these tests captures and runs eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from optc.compiler.capture.dynamo import CapturedGraph, capture_graph
from optc.compiler.capture.size_guards import SizeGuards
from optc.compiler.diagnostics import CaptureError, TargetError
from optc.compiler.rewriting.passes import PassContext
from optc.passes.fusion.attention import FuseAttention

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def captures(module: Callable[..., Any], *calls: tuple[Any, ...]) -> list[CapturedGraph]:
    """What Dynamo makes of calls of a module, captured."""
    found: list[CapturedGraph] = []

    def backend(graph: GraphModule, examples: list[Any]) -> Any:
        found.append(capture_graph(graph, examples))
        return graph.forward

    compiled = torch.compile(module, backend=backend)
    with torch.no_grad():
        for call in calls:
            compiled(*call)
    return found


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor, count: int, factor: float, cache: Tensor) -> tuple[Any, ...]:
        y = (self.inner(x) + self.shift) * factor
        cache.add_(y.sum())
        return torch.cat([y, x.new_zeros(count, 8)]), 2 * x.shape[0], x


def test_arguments_of_a_graph_become_weights_inputs_and_sizes() -> None:
    first, second = captures(
        _Net().eval(),
        (torch.randn(4, 8), 3, 2.0, torch.zeros(())),
        (torch.randn(5, 8), 6, 3.0, torch.zeros(())),
    )
    names = {"inner.0.weight", "inner.0.bias", "inner.1.weight", "inner.1.running_mean", "shift"}
    assert names <= set(dict(first.program.weights()))
    assert [spec.dims for spec in first.program.contract.inputs] == [(4, 8), ()]
    assert not first.arguments.numbers
    dims = [spec.dims for spec in second.program.contract.inputs]
    assert len(dims) == 4  # x, factor, cache, and the count, which no tensor has
    assert isinstance(dims[0][0], str)
    assert isinstance(dims[-1][0], str)
    assert dims[-1][1] == 0
    assert [kind for kind, _ in second.outputs.kinds if kind == "size"] == ["size"]
    for captured in (first, second):
        assert len(captured.written) == 1
        assert captured.program.proof is not None
        assert captured.program.proof.figures[0].max_abs_diff == 0.0
    assert second.program.proof is not None
    assert len(second.program.proof.inputs) == 2  # and one longer


def test_a_weight_that_is_written_is_an_input() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.linear(x) + self.calls

    module = Counts().eval()
    (captured,) = captures(module, (torch.randn(2, 4),))
    assert set(dict(captured.program.weights())) == {"linear.weight", "linear.bias"}
    dims = [spec.dims for spec in captured.program.contract.inputs]
    assert sorted(dims) == [(1,), (2, 4)]
    assert captured.written == (dims.index((1,)),)
    assert float(module.calls) == 1.0  # capture and proof wrote into copies


def _spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / 4.0
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
    return torch.softmax(scores + mask, -1) @ v


def _masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@pytest.mark.parametrize("spelling", [_spelled, _masked])
def test_attention_is_found_in_graphs_of_others(spelling: Callable[..., Tensor]) -> None:
    call = [torch.randn(2, 3, 6, 16) for _ in range(3)]
    (captured,) = captures(spelling, tuple(call))
    result = FuseAttention().run(captured.program, PassContext())
    assert [(layer.causal, layer.num_heads) for layer in result.program.contract.layers] == [(True, 3)]
    torch.testing.assert_close(result.program(*captured.examples)[0], spelling(*call), atol=1e-5, rtol=0)


def test_training_is_refused() -> None:
    def backend(graph: GraphModule, examples: list[Any]) -> Any:
        with pytest.raises(TargetError, match="does not train") as raised:
            capture_graph(graph, examples)
        assert "torch.inference_mode()" in str(raised.value.remedy)
        return graph.forward

    torch.compile(nn.Linear(4, 4), backend=backend)(torch.randn(2, 4))


class _Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x)


@pytest.mark.parametrize(
    "call", [_Autocast(), lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))]
)
def test_graphs_inside_of_graphs_are_refused(call: Callable[..., Any]) -> None:
    def backend(graph: GraphModule, examples: list[Any]) -> Any:
        with pytest.raises(CaptureError, match="runs another graph inside"):
            capture_graph(graph, examples)
        return graph.forward

    with torch.no_grad():
        torch.compile(call, backend=backend)(torch.randn(2, 4))


def test_numbers_below_zero_that_change_are_refused() -> None:
    def backend(graph: GraphModule, examples: list[Any]) -> Any:
        if all(isinstance(item, Tensor) for item in examples):
            return graph.forward
        with pytest.raises(TargetError, match="negative number"):
            capture_graph(graph, examples)
        refused.append(graph)
        return graph.forward

    refused: list[GraphModule] = []
    compiled = torch.compile(lambda x, n: x * n, backend=backend)
    for number in (-3, -4):
        compiled(torch.randn(3), number)
    assert len(refused) == 1


def test_what_was_assumed_of_sizes_is_a_guard_of_dynamos() -> None:
    sizes: list[tuple[Any, ...]] = []
    sizes_seen: list[bool] = []

    def backend(graph: GraphModule, examples: list[Any]) -> Any:
        captured = capture_graph(graph, examples)
        value = captured.program.user_inputs()[0].meta["val"]
        if isinstance(value.shape[0], torch.SymInt):
            sizes_seen.append(bool(value.shape[0] > 9))  # as a compiler does that chooses by size
        guards = SizeGuards(captured, examples)
        guards.install(first=True)
        guards.install(first=False)  # nothing new
        sizes.append(captured.program.contract.inputs[0].dims)
        return graph.forward

    compiled = torch.compile(lambda x: x.relu() + 1, backend=backend)
    for size, graphs in ((4, 1), (5, 2), (9, 2), (10, 3), (12, 3), (6, 3)):
        compiled(torch.randn(size, 2))
        assert len(sizes) == graphs, size
    assert sizes_seen == [False, True]

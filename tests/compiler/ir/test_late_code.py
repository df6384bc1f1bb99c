"""Code of graph modules that is written late is torch's own, and is not written where nobody asks for it."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from optc.compiler.capture import capture_module
from optc.compiler.ir.late_code import late_code


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs whose code was written."""
    graphs: list[Graph] = []
    own = Graph.python_code

    def counting(graph: Graph, *args: object, **options: object) -> object:
        graphs.append(graph)
        return own(graph, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Graph, "python_code", counting)
    return graphs


def _graph() -> Graph:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(torch.sub, (x, y)))
    return graph


def test_code_is_that_of_torch(written: list[Graph]) -> None:
    expected = GraphModule(nn.Module(), _graph()).code
    written.clear()
    with late_code():
        called, read, signed, copied = (GraphModule(nn.Module(), _graph()) for _ in range(4))
    assert written == []
    three, one = torch.tensor(3), torch.tensor(1)
    assert called(three, one) == called(x=three, y=one) == 2
    assert read.code == called.code == expected
    assert list(inspect.signature(signed.forward).parameters) == ["x", "y"]
    assert list(inspect.signature(type(copied).forward).parameters) == ["self", "x", "y"]
    assert len(written) == 4
    other = copy.deepcopy(copied)
    assert other(three, one) == 2


def test_an_edited_graph_is_written_anew() -> None:
    with late_code():
        module = GraphModule(nn.Module(), _graph())
    assert module(torch.tensor(3), torch.tensor(1)) == 2
    (call,) = module.graph.find_nodes(op="call_function", target=torch.sub)
    call.target = torch.add
    with late_code():
        module.recompile()
    assert module(torch.tensor(3), torch.tensor(1)) == 4
    assert "torch.add" in module.code
    call.target = torch.sub
    module.recompile()
    assert module(torch.tensor(3), torch.tensor(1)) == 2
    assert "torch.sub" in module.code


def test_a_program_is_written_when_it_is_called(written: list[Graph]) -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(2, 4)
    program = capture_module(net, (x,))
    written.clear()
    edited = program.clone().changed().clone()
    assert written == []
    for made in (edited, program, edited):
        assert torch.equal(made(x), net(x))
    assert len(written) == 2

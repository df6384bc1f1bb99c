"""Reading graphs: peeling, leaves, probing at small sizes, constants, linear sites, heads and routers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from rewrites import stirred
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import (
    CASTS,
    MOVES,
    Sizes,
    aten,
    constant,
    evaluate,
    leaves,
    peel,
    peel_casts,
    pointwise_source,
    readers,
    sole_user,
    truncates,
)
from optc.compiler.analysis.linears import chooses_experts, head_linear, linear_site, linear_sites
from optc.compiler.capture import capture_module
from optc.compiler.ir.contract import Output
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, drop_dead, replace_call, replace_node
from optc.compiler.rewriting.weights import as_weight, prune_contract


class _Chain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        same = torch.dropout(x.contiguous().to(torch.float32), 0.5, False)
        wide = same.double()
        scale = 1.0 + self.weight.double()
        moved = torch.cat([wide[..., 2:], -wide[..., :2]], -1) * scale
        return moved.transpose(1, 2) + wide.long().float().transpose(1, 2) + index[:, None, :, None]


def _chain() -> Program:
    x, index = torch.rand(2, 3, 5, 4), torch.zeros((2, 3), dtype=torch.long)
    axes: Any = {"x": {0: "batch", 1: "seq"}, "index": {0: "batch", 1: "seq"}}
    return capture_module(_Chain(), (x, index), input_names=("x", "index"), dynamic=axes)


def _first(program: Program, target: Any) -> Node:
    return program.calls(target)[0]


def test_peel_stops_where_values_or_types_change() -> None:
    program = _chain()
    x = program.user_inputs()[0]
    double = next(n for n in program.calls(aten.to.dtype) if n.args[1] is torch.float64)
    assert peel(double) is double
    assert peel_casts(double) is x
    integer = next(n for n in program.calls(aten.to.dtype) if n.args[1] is torch.int64)
    assert truncates(integer)
    assert not truncates(double)
    assert peel_casts(integer) is integer


def test_leaves_and_sole_user() -> None:
    program = _chain()
    x = program.user_inputs()[0]
    product = _first(program, aten.mul.Tensor)
    found = leaves(product, lambda node: node.target in MOVES | CASTS | {aten.neg.default, aten.mul.Tensor})
    assert [node.name for node in found] == ["dropout", "add"]
    assert sole_user(product) is _first(program, aten.transpose.int)
    asserts = [user for user in x.users if "assert" in user.name]
    assert asserts  # of the capture; they do not count
    assert not set(asserts) & set(readers(x))


def test_evaluate_at_small_sizes() -> None:
    program = _chain()
    x, index = program.user_inputs()
    sizes = Sizes()
    batch, length = sizes.shape(index)
    assert (batch, length) in ((2, 3), (3, 2))
    output = program.graph.output_node().args[0][0]
    values = {
        x: torch.rand(sizes.shape(x), dtype=torch.float64),
        index: torch.ones(sizes.shape(index), dtype=torch.float64),
        next(node for node in program.graph.nodes if program.weight_of(node)): torch.arange(4.0),
    }
    assert evaluate(output, values, sizes).shape == (batch, 5, length, 4)


def test_constants_are_folded_named_and_shared() -> None:
    program = _chain().clone()
    scale = _first(program, aten.mul.Tensor).args[1]
    assert isinstance(scale, Node)
    value = constant(program, scale)
    assert value is not None
    assert value.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert constant(program, _first(program, aten.mul.Tensor)) is None
    node = as_weight(program, scale, torch.float32, "folded")
    assert program.weight_of(node) == "weight_folded"
    assert as_weight(program, scale, torch.float32, "folded") is node
    assert program.weight_of(as_weight(program, scale, torch.float64, "folded")) == "weight_folded"
    assert program.contract.sources["weight_folded"] == ("weight",)
    replace_node(program, scale, node)
    drop_dead(program)
    assert prune_contract(program.changed()).contract.sources == {"weight_folded": ("weight",)}


def test_pointwise_source() -> None:
    program = _chain()
    product = _first(program, aten.mul.Tensor)
    assert pointwise_source(program, _first(program, aten.transpose.int)) is product
    assert pointwise_source(program, program.user_inputs()[0]) is None
    assert pointwise_source(program, _first(program, aten.cat.default)) is None


class _Products(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)
        self.right = torch.nn.Parameter(torch.rand(8, 6))
        self.stack = torch.nn.Parameter(torch.rand(3, 5, 8))
        self.bias = torch.nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linear = torch.nn.functional.linear
        return (
            self.linear(x),
            torch.addmm(self.bias, x, self.right),
            x @ self.right,
            linear(x, self.stack[1]),
            linear(x, x * 2.0),  # no weight
            torch.addmm(self.bias, x, self.right, alpha=2.0),  # not a linear's scale
            x @ x.t(),
        )


def test_linear_sites() -> None:
    program = capture_module(_Products(), (torch.rand(8, 8),))
    sites = list(linear_sites(program))
    held = [program.weight_of(site.placeholder) for site in sites]
    assert held == ["linear.weight", "right", "right", "stack"]
    assert [site.transposed for site in sites] == [False, True, True, False]
    assert [site.index for site in sites] == [None, None, None, 1]
    assert [site.columns for site in sites] == [8, 8, 8, 8]
    assert [site.bias is not None for site in sites] == [True, True, False, False]
    assert linear_site(program, program.user_inputs()[0]) is None


def test_heads_and_routers_by_dataflow() -> None:
    for name, weight in (
        ("gemma2", "lm_head.weight"),
        ("granite", "lm_head.weight"),
        ("gpt2", "lm_head.weight"),
    ):
        program = stirred(name)
        head = head_linear(program)
        assert head is not None
        assert program.weight_of(head.args[1]) == weight
    mixtral = stirred("mixtral")
    routers = [site for site in linear_sites(mixtral) if chooses_experts(mixtral, site.node)]
    assert [mixtral.weight_of(site.placeholder) for site in routers] == [
        f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)
    ]


def test_a_module_has_no_head() -> None:
    program = capture_module(torch.nn.Linear(4, 4), (torch.rand(2, 4),))
    assert head_linear(program) is None
    named = program.with_contract(outputs=(Output(name="hidden", role="hidden"),))
    assert head_linear(named) is named.calls(aten.linear.default)[0]


@pytest.mark.parametrize("name", ["a+b.weight", "0.weight", "a b.weight"])
def test_new_weights_may_have_any_name_and_be_the_output(name: str) -> None:
    program = capture_module(torch.nn.Linear(4, 4), (torch.rand(2, 4),)).clone()
    output = program.calls(aten.linear.default)[0]
    weight = add_weight(program, name, 2.0 * torch.eye(4))
    replace_call(program, output, aten.linear.default, (output.args[0], weight))
    drop_dead(program)
    x = torch.rand(2, 4)
    assert torch.equal(program.changed()(x), 2.0 * x)
    assert [name for name, _ in program.weights()] == [name]


def test_values_are_let_go_without_a_collection_of_cycles() -> None:
    """Weights of large models are among them."""
    graph = torch.fx.Graph()
    leaf = graph.placeholder("leaf")
    node = graph.call_function(torch.add, (leaf, 1))
    values = {leaf: torch.ones(3)}
    held = weakref.ref(values[leaf])
    gc.disable()
    try:
        assert torch.equal(evaluate(node, values), torch.full((3,), 2.0))
        values.clear()
        assert held() is None
    finally:
        gc.enable()

"""Nodes against the schemas of their operators, one case each."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from optc.compiler.artifact.onnx_folding import folded_numbers, inferred
from optc.compiler.artifact.onnx_schemas import misfit

FLOAT = TensorProto.FLOAT


def node(op: str, inputs: str, outputs: str = "y", domain: str = "", **attributes: object) -> object:
    split = [name.strip() for name in inputs.split(",")] if inputs else []
    return helper.make_node(op, split, outputs.split(",") if outputs else [], domain=domain, **attributes)


MS = "com.microsoft"
SIZES = {"K": 64, "N": 8, "block_size": 32}
HEADS = {"num_heads": 2, "kv_num_heads": 1}
CASES = {
    "fits": (node("Add", "a,b"), None),
    "an optional input left out": (node("Clip", "a,,b"), None),
    "a variable number": (node("Concat", "a,b,c", axis=0), None),
    "own operator": (node("MatMulNBits", "a,b,c", domain=MS, **SIZES, bits=4), None),
    "own operator, optional left out": (node("MatMulNBits", "a,b,c,,,d", domain=MS, **SIZES), None),
    "packed query": (node("GroupQueryAttention", "q,,,k,v,s,t", "a,b,c", domain=MS, **HEADS), None),
    "too few": (node("Add", "a"), "1 inputs and 1 outputs"),
    "too many": (node("Add", "a,b,c"), "3 inputs and 1 outputs"),
    "an empty name": (node("Add", "a,"), "its input 1 (B) is missing"),
    "an empty name first": (node("Gather", ",b"), "its input 0 (data) is missing"),
    "an empty name among many": (node("Concat", "a,,c", axis=0), "its input 1 (inputs) is missing"),
    "no output": (node("Add", "a,b", ""), "2 inputs and 0 outputs"),
    "an output without a name": (node("Add", "a,b", ","), "2 inputs and 2 outputs"),
    "an unknown attribute": (node("Add", "a,b", evil=1), "it has an attribute 'evil'"),
    "an attribute of another type": (node("Concat", "a,b", axis="0"), "its attribute 'axis' has another type"),
    "an attribute that is missing": (node("Concat", "a,b"), "it lacks the attribute 'axis'"),
    "own operator without weights": (node("MatMulNBits", "a,,c", domain=MS), "its input 1 is missing"),
    "own operator with more": (node("MatMulBnb4", "a,b,c,d", domain=MS), "4 inputs and 1 outputs"),
    "own operator without lengths": (node("GroupQueryAttention", "q,k,v", "a", domain=MS), "its input 5 is missing"),
    "own operator, no name": (node("Gelu", "a", "", domain=MS), "1 inputs and 0 outputs"),
    "own operator, a number below its bounds": (
        node("GroupQueryAttention", "q,,,k,v,s,t", domain=MS, **HEADS | {"kv_num_heads": -1}),
        "its attribute 'kv_num_heads' is -1",
    ),
    "own operator, a number beyond": (
        node("MatMulNBits", "a,b,c", domain=MS, **SIZES, bits=9),
        "its attribute 'bits' is 9",
    ),
    "own operator, an unknown attribute": (node("Gelu", "a", domain=MS, evil=1), "it has an attribute 'evil'"),
    "own operator, another type": (
        node("SkipLayerNormalization", "a,b,c", domain=MS, epsilon=1),
        "its attribute 'epsilon' has another type",
    ),
    "own operator, an attribute that is missing": (
        node("MatMulNBits", "a,b,c", domain=MS, K=64, N=8),
        "it lacks the attribute 'block_size'",
    ),
    "a step of 0": (node("MaxPool", "a", kernel_shape=[2, 2], strides=[1, 0]), "its attribute 'strides' is [1, 0]"),
    "no groups": (node("Conv", "a,b", group=0), "its attribute 'group' is [0]"),
    "an operator of later versions": (node("RMSNormalization", "a,b"), "operator set 17 has no such operator"),
}


@pytest.mark.parametrize("name", CASES)
def test_misfits(name: str) -> None:
    given, expected = CASES[name]
    version = 17 if name == "an operator of later versions" else 24
    assert misfit(given, version) == expected


def test_types() -> None:
    """Of a graph whose nodes fit."""

    def model(kind: int) -> object:
        inputs = [helper.make_tensor_value_info("a", FLOAT, [2]), helper.make_tensor_value_info("b", kind, [2])]
        graph = helper.make_graph([node("Add", "a,b")], "g", inputs, [helper.make_tensor_value_info("y", FLOAT, [2])])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])

    assert not isinstance(inferred(model(FLOAT)), str)
    assert "type" in inferred(model(TensorProto.INT64))
    assert isinstance(inferred(model(0)), str)


@pytest.mark.parametrize(
    ("limit", "fed", "expected"),
    [
        (1000, False, 2000),
        (1 << 40, False, 2 << 40),
        (1000, True, 0),  # an initializer of an input's name is no constant
    ],
)
def test_what_is_folded(limit: int, fed: bool, expected: int) -> None:
    """Range and Cast of constants are computed when the model is opened; what depends on an input is not."""
    nodes = [node("Range", "zero,limit,one", "r"), node("Cast", "r", "c", to=FLOAT), node("Add", "c,x", "y")]
    values = {"zero": 0, "limit": limit, "one": 1}
    tensors = [helper.make_tensor(name, TensorProto.INT64, [], [value]) for name, value in values.items()]
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["n"])]
    inputs += [helper.make_tensor_value_info("limit", TensorProto.INT64, [])] if fed else []
    outputs = [helper.make_tensor_value_info("y", FLOAT, ["n"])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    found = inferred(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))
    assert folded_numbers(found) == expected


INT = TensorProto.INT64


def folded(nodes: list[object], **values: int) -> int | str:
    """Of a graph that ends in r + x, with whole numbers as constants."""
    info = helper.make_tensor_value_info
    tensors = [helper.make_tensor(name, INT, [], [value]) for name, value in values.items()]
    graph = helper.make_graph(
        [*nodes, node("Add", "r,x", "y")], "g", [info("x", INT, ["n"])], [info("y", INT, ["n"])], tensors
    )
    return folded_numbers(inferred(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])))


def test_sizes_that_are_computed_follow() -> None:
    """A range up to a sum, whose length is that of another."""
    nodes = [
        node("Add", "limit,limit", "sum"),
        node("Range", "zero,sum,one", "first"),
        node("Shape", "first", "shape"),
        node("Expand", "one,shape", "wide"),
        node("Squeeze", "shape", "length"),
        node("Range", "zero,length,one", "last"),
        node("Add", "wide,last", "r"),
    ]
    assert folded(nodes, zero=0, one=1, limit=500) == 4 * 1000  # the ranges, wide, and r
    found = folded(nodes, zero=0, one=1, limit=1 << 40)
    assert isinstance(found, str) or found >= 1 << 41


def test_a_size_that_does_not_follow() -> None:
    nodes = [node("Sqrt", "f", "s"), node("Cast", "s", "limit", to=INT), node("Range", "zero,limit,one", "r")]
    cast = node("Cast", "big", "f", to=FLOAT)
    assert "'r'" in str(folded([cast, *nodes], zero=0, one=1, big=1 << 50))

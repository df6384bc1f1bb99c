"""Nodes against the schemas of their operators, one case each."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from optc.compiler.artifact.onnx_schemas import misfit, type_misfit

FLOAT = TensorProto.FLOAT


def node(op: str, inputs: str, outputs: str = "y", domain: str = "", **attributes: object) -> object:
    split = [name.strip() for name in inputs.split(",")] if inputs else []
    return helper.make_node(op, split, outputs.split(",") if outputs else [], domain=domain, **attributes)


MS = "com.microsoft"
CASES = {
    "fits": (node("Add", "a,b"), None),
    "an optional input left out": (node("Clip", "a,,b"), None),
    "a variable number": (node("Concat", "a,b,c", axis=0), None),
    "own operator": (node("MatMulNBits", "a,b,c", domain=MS), None),
    "own operator, optional left out": (node("MatMulNBits", "a,b,c,,,d", domain=MS), None),
    "packed query": (node("GroupQueryAttention", "q,,,k,v,s,t", "a,b,c", domain=MS), None),
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

    assert type_misfit(model(FLOAT)) is None
    assert "type" in str(type_misfit(model(TensorProto.INT64)))
    assert type_misfit(model(0)) is not None

"""Replace one call of a graph by the graph of a Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import fake_mode, replace_node


def inline_call(program: Program, node: Node, function: Callable[..., Any], *extra: Node) -> Node:
    """Trace `function(*extra, *node.args, **node.kwargs)` and put its operators in place of `node`.

    The trace runs on the fake values of the graph, so shapes stay symbolic in the program's own
    symbols; in-place operators stay in place. Source lines are taken from `node`.

    Args:
        function: tensors, sizes and numbers in, one tensor out; must not branch on data.
        extra: further values of the graph, passed before the node's own arguments.

    Returns:
        The node that stands in place of `node`.
    """
    flat, spec = pytree.tree_flatten(((*extra, *node.args), dict(node.kwargs)))
    places = [index for index, item in enumerate(flat) if isinstance(item, Node)]

    def call(*values: Any) -> Any:
        full = list(flat)
        for place, value in zip(places, values, strict=True):
            full[place] = value
        args, kwargs = pytree.tree_unflatten(full, spec)
        return function(*args, **kwargs)

    with fake_mode(program), torch.no_grad():
        traced = make_fx(call, pre_dispatch=True)(*(flat[place].meta["val"] for place in places))
    inputs = [item for item in traced.graph.nodes if item.op == "placeholder"]
    values = {item: flat[place] for item, place in zip(inputs, places, strict=True)}
    kept = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
    with program.graph.inserting_before(node):
        for item in traced.graph.nodes:
            if item.op == "call_function":
                values[item] = program.graph.node_copy(item, values.__getitem__)
                values[item].meta = {**kept, "val": item.meta.get("val")}
            assert item.op in ("placeholder", "call_function", "output"), f"the function captures {item.name}"
    (result,) = traced.graph.output_node().args
    assert isinstance(result, Node), "the function must return one tensor"
    replaced = values[result]
    replace_node(program, node, replaced)
    return replaced

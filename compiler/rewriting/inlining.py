"""Replace one call of a graph by the graph of a Python function."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import fake_mode, replace_node


class InliningError(Exception):
    """A function's operators depend on sizes that the program leaves open (its trace would hold for some of them
    only), or are none of ATen."""


def inline_call(
    program: Program,
    node: Node,
    function: Callable[..., Any],
    *extra: Node,
    composite: bool = True,
    any_size: bool = False,
) -> Node | None:
    """Trace `function(*extra, *node.args, **node.kwargs)` and put its operators in place of `node`.

    The trace runs on the fake values of the graph, so shapes stay symbolic in the program's own
    symbols; in-place operators stay in place. Source lines are taken from `node`.

    Args:
        function: tensors, sizes and numbers in, one tensor out, or several where the node's readers take them apart
            (getitem); must not branch on data.
        extra: further values of the graph, passed before the node's own arguments.
        composite: keep ATen's composite operators (linear, conv2d) as they are called; else their parts are traced.
        any_size: refuse a trace that holds for some sizes only.

    Returns:
        The node that stands in place of `node`; None for several.

    Raises:
        InliningError: with `any_size` the function branches on a symbolic size; or it calls torch's `prims`. The graph is as it was.
    """
    flat, spec = pytree.tree_flatten(((*extra, *node.args), dict(node.kwargs)))
    places = [index for index, item in enumerate(flat) if isinstance(item, Node)]

    def call(*values: Any) -> Any:
        full = list(flat)
        for place, value in zip(places, values, strict=True):
            full[place] = value
        args, kwargs = pytree.tree_unflatten(full, spec)
        result = function(*args, **kwargs)
        return tuple(result) if isinstance(result, tuple | list) else result

    mode = fake_mode(program)
    guards = 0 if mode.shape_env is None else len(mode.shape_env.guards)
    with mode, torch.no_grad():
        traced = make_fx(call, pre_dispatch=composite)(*(flat[place].meta["val"] for place in places))
    if any_size and mode.shape_env is not None and len(mode.shape_env.guards) > guards:
        raise InliningError(f"it depends on sizes: {mode.shape_env.guards[guards].expr}")
    prims = next((item.target for item in traced.graph.nodes if getattr(item.target, "namespace", "") == "prims"), None)
    if prims is not None:
        raise InliningError(f"it is made of {prims}")
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
    assert isinstance(result, Node | tuple | list)
    if isinstance(result, Node):
        replaced: Node = values[result]
        replace_node(program, node, replaced)
        return replaced
    for user in list(node.users):
        assert user.target is operator.getitem, "several results are taken apart"
        replace_node(program, user, values[result[user.args[1]]])
    program.graph.erase_node(node)
    return None

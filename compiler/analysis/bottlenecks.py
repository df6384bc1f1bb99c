"""Where everything that a program makes of its tokens passes through one tensor: between its layers, above all."""

from __future__ import annotations

from torch.fx import Node

from optc.compiler.analysis.dataflow import SHAPE_ONLY, inputs_of, value_of
from optc.compiler.ir.program import Program
from optc.compiler.ops.library import attends


def bottlenecks(source: Node, sink: Node) -> list[Node]:
    """The nodes that every path of values from one node to another goes through, both among them, in graph order.

    In a topological order these are the nodes that no edge passes over, of those on any path. Shapes are no values.
    """
    behind = _behind(source)
    path = _in_front_of(sink, behind)
    found, reach = [], -1
    for place, node in enumerate(path):
        if reach <= place:
            found.append(node)
        reach = max([reach, *(path[user] for user in _readers(node) if user in path)])
    return found


def layer_inputs(program: Program) -> list[Node | None]:
    """Of each attention call, in graph order, the last bottleneck in front of it, from the input's tokens to the logits.

    In a model with a residual stream that is the stream as the layer finds it, in front of its norm. None where there is
    none of floats between a call and the one before it: the two share what they read.
    """
    output, tokens = program.graph.output_node(), program.contract.input_index("input_ids")
    logits = next(i for i, spec in enumerate(program.contract.outputs) if spec.role == "logits")
    assert tokens is not None
    values = output.args[0][-len(program.contract.outputs) :]  # mutations come first
    found = bottlenecks(program.user_inputs()[tokens], values[logits])
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    inputs: list[Node | None] = []
    before = -1
    for call in (node for node in program.graph.nodes if attends(node.target)):
        node = next((node for node in reversed(found) if order[node] < order[call]), None)
        own = node is not None and order[node] > before and value_of(node).is_floating_point()
        inputs.append(node if own else None)
        before = order[call]
    return inputs


def _readers(node: Node) -> list[Node]:
    """The nodes that read a node's values."""
    return [user for user in node.users if user.target not in SHAPE_ONLY and node in inputs_of(user)]


def _behind(source: Node) -> set[Node]:
    found, pending = {source}, [source]
    while pending:
        new = [user for user in _readers(pending.pop()) if user not in found]
        found.update(new)
        pending += new
    return found


def _in_front_of(sink: Node, among: set[Node]) -> dict[Node, int]:
    """The nodes of a set that a node is made of, itself among them, in graph order, with their places."""
    found, pending = {sink}, [sink]
    while pending:
        node = pending.pop()
        new = [item for item in among.intersection(inputs_of(node)) if item not in found and node in _readers(item)]
        found.update(new)
        pending += new
    return {node: place for place, node in enumerate(sorted(found))}

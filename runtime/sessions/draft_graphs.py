"""The graphs of a draft model (EAGLE-3) for the three things that it does on a device.

Its program takes, of each position, the base's states and its own, of which one is 0, and spreads its logits over the base's
vocabulary. Where it is known which of them is 0, the product with it is left out; what chooses a token needs the logits of
the draft vocabulary alone; and of a prompt nothing is wanted but keys and values. What a token's embedding adds to queries,
keys and values depends on the token alone: it is looked up in a table of them all, where that is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.program import Program
from optc.runtime.sessions.torch_linear import Run

_LINEAR = torch.ops.optc.fused_linear.default
_ATTENTION = (torch.ops.optc.rotary_paged_attention_.default, torch.ops.optc.paged_attention_.default)
_RESIDUAL = 7
"""Place of it among the arguments of `fused_linear`."""
_MOST_BYTES = 64 << 20
"""Of a table of what embeddings add."""


@dataclass(frozen=True)
class DraftGraphs:
    """Functions of the program's inputs, which take all of them.

    Attributes:
        keys: writes keys and values of base states.
        first: takes, behind them, int64 [B]; logits [B, D] over the draft vocabulary and states [B, H] behind the base
            states of these tokens.
        further: logits [n, D] and states [n, H] behind the model's own states.
        targets: int64 [D], the tokens of the draft vocabulary.
    """

    keys: Run
    first: Run
    further: Run
    targets: Tensor


@torch.no_grad()
def draft_graphs(program: Program) -> DraftGraphs:
    """The graphs of a draft model's program, which share weights with its module.

    Raises:
        TargetError: the program does not bring both states together as `fuse-decode` leaves it.
    """
    module = program.module()
    base, own = (_input(program, role) for role in ("base_states", "own_states"))
    weights = {str(node.target): _attribute(module, node) for node in module.graph.find_nodes(op="get_attr")}
    whole = _copied(module.graph)
    _look_up(whole, weights)
    targets = _targets(whole, weights, program.contract.model.vocab_size)
    first, further, keys = (_copied(whole) for _ in range(3))
    for graph in (first, further):
        _narrow(graph)
    for graph in (first, keys):
        _drop_residual(graph, own)
    _drop_product(further, base)
    _select(first)
    _end_at_attention(keys)
    made = [
        GraphModule(weights, _pruned(graph, unread)).forward
        for graph, unread in ((keys, own), (first, own), (further, base))
    ]
    return DraftGraphs(made[0], made[1], made[2], targets)


def _input(program: Program, role: str) -> str:
    place = next(index for index, spec in enumerate(program.contract.inputs) if spec.role == role)
    return program.user_inputs()[place].name


def _attribute(module: GraphModule, node: Node) -> Tensor:
    value = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def _copied(old: Graph) -> Graph:
    graph = Graph()
    graph.output(graph.graph_copy(old, {}))
    return graph


def _pruned(graph: Graph, unread: str) -> Graph:
    graph.eliminate_dead_code()
    graph.lint()
    (states,) = (node for node in graph.find_nodes(op="placeholder") if node.name == unread)
    if states.users:
        raise TargetError(
            "the draft model cannot be run without the states that are 0",
            where=str(next(iter(states.users))),
            why="no one product reads the base's states, and adds the model's own",
            remedy="compile the draft model again with this version of optc",
        )
    return graph


def _spread(graph: Graph) -> Node | None:
    """The call that spreads logits over the base's vocabulary, if the logits come from it by views alone."""
    output = graph.output_node().args[0]
    assert isinstance(output, tuple | list)
    node = output[0]
    while isinstance(node, Node) and node.target in (torch.ops.aten.select.int, torch.ops.aten.clone.default):
        node = node.args[0]
    found = isinstance(node, Node) and node.target is torch.ops.aten.index_copy.default
    return node if found else None


def _targets(graph: Graph, weights: dict[str, Tensor], vocabulary: int) -> Tensor:
    call = _spread(graph)
    if call is None:
        return torch.arange(vocabulary, device=next(iter(weights.values())).device)
    table = call.args[2]
    assert isinstance(table, Node)
    return weights[str(table.target)]


def _look_up(graph: Graph, weights: dict[str, Tensor]) -> None:
    """linear(cat(norm(embedding[ids]), h))  ->  linear(h) + table[ids], which adds a weight; nothing where it is large."""
    for cat in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts, linear = cat.args[0], next(iter(cat.users), None)
        assert isinstance(parts, list | tuple)
        norm = parts[0]
        if len(parts) != 2 or len(cat.users) != 1 or linear is None or linear.target is not _LINEAR:
            continue
        if not isinstance(norm, Node) or norm.target is not torch.ops.optc.fused_norm.default or len(norm.users) != 1:
            continue
        lookup, wide = norm.args[0], linear.args[1]
        bare = all(item is None for item in linear.args[2:]) and not any(linear.kwargs.values())
        if not bare or not isinstance(lookup, Node) or lookup.target is not torch.ops.optc.select_rows.default:
            continue
        rows, ids = lookup.args
        plain = (
            isinstance(rows, Node)
            and isinstance(wide, Node)
            and not lookup.kwargs
            and not isinstance(norm.args[3], Node)
        )
        if not plain or weights[str(rows.target)].shape[0] * weights[str(wide.target)][:, :1].nbytes > _MOST_BYTES:
            continue
        _split(graph, weights, (rows, ids, norm, wide, linear), parts[1])


def _split(graph: Graph, weights: dict[str, Tensor], found: tuple[Any, Node, Node, Node, Node], other: Any) -> None:
    """See `_look_up`."""
    rows, ids, norm, wide, linear = found
    weight, embedding = weights[str(wide.target)], weights[str(rows.target)]
    width = embedding.shape[1]
    values = [weights[str(item.target)] if isinstance(item, Node) else item for item in norm.args[1:3]]
    normed = torch.ops.optc.fused_norm(embedding, *values, None, **norm.kwargs)
    weights["embedded_table"] = normed @ weight[:, :width].T
    weights["other_columns"] = weight[:, width:].contiguous()
    with graph.inserting_before(linear):
        table, columns = (graph.get_attr(name) for name in ("embedded_table", "other_columns"))
        added = graph.call_function(torch.ops.optc.select_rows.default, (table, ids))
    linear.args = (other, columns, *[None] * (_RESIDUAL - 2), added)


def _narrow(graph: Graph) -> None:
    """Logits of the draft vocabulary."""
    call = _spread(graph)
    if call is not None:
        source = call.args[3]
        assert isinstance(source, Node)
        call.replace_all_uses_with(source)
        graph.erase_node(call)


def _viewed(node: object) -> Node | None:
    """The input that a node views as one request's."""
    if isinstance(node, Node) and node.target is torch.ops.aten.unsqueeze.default:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "placeholder" else None


def _is_input(node: object, name: str) -> bool:
    found = _viewed(node)
    return found is not None and found.name == name


def _drop_residual(graph: Graph, own: str) -> None:
    """The product of the base's states, without the model's own, which are 0."""
    for call in graph.find_nodes(op="call_function", target=_LINEAR):
        if _is_input(call.args[_RESIDUAL], own):
            call.args = (*call.args[:_RESIDUAL], None, *call.args[_RESIDUAL + 1 :])


def _drop_product(graph: Graph, base: str) -> None:
    """The model's own states, without the product of the base's, which are 0."""
    for call in graph.find_nodes(op="call_function", target=_LINEAR):
        residual = call.args[_RESIDUAL]
        plain = all(item is None for item in call.args[4:_RESIDUAL]) and not call.kwargs.get("activation")
        if plain and _is_input(call.args[0], base) and isinstance(residual, Node):
            call.replace_all_uses_with(residual)
            graph.erase_node(call)


def _select(graph: Graph) -> None:
    """Logits and states of the tokens that one more input names.

    Raises:
        TargetError: the head does not read the states.
    """
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    logits, states = (item.args[0] if isinstance(item, Node) else None for item in outputs)
    if not isinstance(logits, Node) or logits.target is not _LINEAR or logits.args[0] is not states:
        raise TargetError(
            "the draft model's tokens cannot be selected in front of its head",
            why="its logits are not a product of the states that it gives",
            remedy="compile the draft model again with this version of optc",
        )
    assert isinstance(states, Node)
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        picks = graph.placeholder("picks")
    with graph.inserting_before(logits):
        rows = graph.call_function(torch.ops.aten.select.int, (states, 0, 0))
        found = graph.call_function(torch.ops.optc.select_rows.default, (rows, picks))
        whole = graph.call_function(torch.ops.aten.unsqueeze.default, (found, 0))
    logits.args = (whole, *logits.args[1:])
    graph.output_node().args = ((outputs[0], found),)


def _end_at_attention(graph: Graph) -> None:
    """Nothing is computed behind the last call that writes the cache."""
    last = [node for node in graph.nodes if node.target in _ATTENTION][-1]
    graph.output_node().args = (last,)

"""The graphs of a draft model (EAGLE-3) for the three things that it does on a device.

Its program takes, of each position, the base's states and its own, of which one is 0, and spreads its logits over the base's
vocabulary. Where it is known which of them is 0, the product with it is left out; what chooses a token needs the logits of
the draft vocabulary alone; and of a prompt nothing is wanted but keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class DraftGraphs:
    """Functions of the program's inputs, which take all of them.

    Attributes:
        keys: writes keys and values of base states.
        first: logits [n, D] over the draft vocabulary and states [n, H] behind base states.
        further: the same behind the model's own states.
        targets: int64 [D], the tokens of the draft vocabulary.
    """

    keys: Run
    first: Run
    further: Run
    targets: Tensor


def draft_graphs(program: Program) -> DraftGraphs:
    """The graphs of a draft model's program, which share weights with its module.

    Raises:
        TargetError: the program does not bring both states together as `fuse-decode` leaves it.
    """
    module = program.module()
    base, own = (_input(program, role) for role in ("base_states", "own_states"))
    targets = _targets(module, program.contract.model.vocab_size)
    first, further = _copied(module), _copied(module)
    for graph in (first, further):
        _narrow(graph)
    _drop_residual(first, own)
    _drop_product(further, base)
    keys = _copied(module)
    _drop_residual(keys, own)
    _end_at_attention(keys)
    made = [
        GraphModule(module, _pruned(graph, unread)).forward
        for graph, unread in ((keys, own), (first, own), (further, base))
    ]
    return DraftGraphs(made[0], made[1], made[2], targets)


def _input(program: Program, role: str) -> str:
    place = next(index for index, spec in enumerate(program.contract.inputs) if spec.role == role)
    return program.user_inputs()[place].name


def _copied(module: GraphModule) -> Graph:
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
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


def _targets(module: GraphModule, vocabulary: int) -> Tensor:
    call = _spread(module.graph)
    if call is None:
        return torch.arange(vocabulary, device=next(module.parameters()).device)
    table = call.args[2]
    assert isinstance(table, Node)
    value = module
    for part in str(table.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


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


def _end_at_attention(graph: Graph) -> None:
    """Nothing is computed behind the last call that writes the cache."""
    last = [node for node in graph.nodes if node.target in _ATTENTION][-1]
    graph.output_node().args = (last,)

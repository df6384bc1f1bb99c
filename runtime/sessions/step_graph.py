"""The graph of a step that wants the logits of all its tokens, in their order."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from optc.compiler.ir.program import Program


def without_selection(program: Program) -> GraphModule:
    """A program's module without the call that selects the rows of `logits_indices`, which it still takes.

    For inputs where these name all tokens in their order: the call would copy every row. It shares weights with the
    program's module; a program without such a call has that one.
    """
    module = program.module()
    place = program.contract.input_index("logits_indices")
    if place is None:
        return module
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    indices = graph.find_nodes(op="placeholder", target=program.user_inputs()[place].name)[0]
    for call in list(indices.users):
        if call.target in (torch.ops.optc.select_rows.default, torch.ops.aten.index_select.default):
            rows = call.args[0]
            assert isinstance(rows, Node)
            call.replace_all_uses_with(rows)
            graph.erase_node(call)
    return GraphModule(module, graph)

"""Rows by their indices, for CUDA: torch's kernels wait for the one before, and hold up the one behind.

embedding(table, ids) [* number]            ->  select_rows(table, ids, factor=number)
index_select(x [1, N, C], axis of N, rows)  ->  select_rows(x [N, C], rows)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, constant, scalar, sole_user, value_of
from optc.compiler.analysis.rows import forward
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_node
from optc.compiler.kernels.kernel import find_kernel
from optc.compiler.rewriting.passes import Match, Miss, Rule

_SELECT = torch.ops.optc.select_rows.default


class SelectRows(Rule):
    """embedding, index_select -> optc.select_rows, where the kernel takes it"""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is aten.embedding.default:
            table, indices = node.args[:2]
            end, factor = _scaled(program, node)
        elif node.target is aten.index_select.default and _of_rows(node):
            (table, _, indices), end, factor = node.args, node, 1.0
        else:
            return None
        assert isinstance(table, Node)
        assert isinstance(indices, Node)
        kernel = find_kernel(_SELECT, "cuda")
        assert kernel is not None
        rows = value_of(table)
        reason = kernel.obstacle_of((rows.reshape(-1, rows.shape[-1]), indices), {"factor": factor})
        if reason is not None:
            return Miss(node.name, reason)
        return Match(end, {"table": table, "indices": indices, "factor": factor})

    def rewrite(self, program: Program, match: Match) -> None:
        end, table = match.node, match.found["table"]
        shape = value_of(end).shape
        if value_of(table).dim() > 2:
            table = insert_call(program, end, aten.reshape.default, (table, [-1, int(value_of(table).shape[-1])]))
        options = {} if match.found["factor"] == 1.0 else {"factor": match.found["factor"]}
        selected = insert_call(program, end, _SELECT, (table, match.found["indices"]), options)
        while value_of(selected).dim() < len(shape):
            selected = insert_call(program, end, aten.unsqueeze.default, (selected, 0))
        replace_node(program, end, selected)


def _of_rows(node: Node) -> bool:
    """Whether rows [C] of a tensor [N, C], or [1, N, C], are selected."""
    source, axis = node.args[:2]
    assert isinstance(source, Node)
    assert isinstance(axis, int)
    shape = value_of(source).shape
    return len(shape) >= 2 and axis % len(shape) == len(shape) - 2 and all(size == 1 for size in shape[:-2])


def _scaled(program: Program, node: Node) -> tuple[Node, float]:
    """The rows of an embedding times a number that follows, and the number."""
    product = sole_user(forward(node))
    if product is None or product.target is not aten.mul.Tensor or value_of(product).dtype != value_of(node).dtype:
        return node, 1.0
    if value_of(product).shape != value_of(node).shape:
        return node, 1.0
    (other,) = [item for item in product.args if item is not forward(node)] or [None]
    number = scalar(other)
    if number is None and isinstance(other, Node) and value_of(other).dim() == 0:
        value = constant(program, other)
        number = None if value is None else float(value)
    return (node, 1.0) if number is None else (product, number)

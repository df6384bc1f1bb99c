"""Rows of activations with the number of axes that a call wants."""

from __future__ import annotations

from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call


def with_rank(program: Program, before: Node, node: Node, rank: int) -> Node:
    """Rows as [N, C] or [1, N, C]."""
    value = value_of(node)
    if value.dim() == rank:
        return node
    if rank == 2:
        return insert_call(program, before, aten.reshape.default, (node, [-1, int(value.shape[-1])]))
    return insert_call(program, before, aten.unsqueeze.default, (node, 0))

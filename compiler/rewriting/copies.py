"""Views of what a rewrite put in place of a call, whose memory may lie otherwise."""

from __future__ import annotations

from torch.fx import Node

from optc.compiler.analysis.dataflow import CASTS, COPIES, MOVES, aten, readers
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import infer_meta


def allow_copies(program: Program, node: Node) -> None:
    """Let what rearranges the result copy: `view` relied on the layout of the node that stood here."""
    stack = [node]
    while stack:
        current = stack.pop()
        for user in readers(current):
            if user.target in MOVES | COPIES | CASTS and user.args[0] is current:
                if user.target is aten.view.default:
                    user.target = aten.reshape.default
                infer_meta(program, user)
                stack.append(user)

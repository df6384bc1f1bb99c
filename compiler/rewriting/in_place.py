"""Calls that write into tensors, in the form that gives what would have been written."""

from __future__ import annotations

import torch
from torch.fx import Node

from optc.compiler.analysis.aliases import unshared
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import replace_node


def without_writing(program: Program, node: Node) -> None:
    """Give a call that writes its other form, which computes the same where nobody else sees that memory."""
    name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
    if name in _DROPOUTS and node.args[2] is False:
        replace_node(program, node, node.args[0])
        return
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet is not None and overload in packet.overloads() and unshared(node) is None:
        node.target = getattr(packet, overload)  # arguments and results are the same


_DROPOUTS = ("dropout_", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_")
"""What does nothing in eval mode: (x, p, train)."""

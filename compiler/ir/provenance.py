"""Where a node of a graph came from in the model."""

from __future__ import annotations

from torch.fx import Node


def module_path(node: Node) -> str:
    """The innermost module of the captured model that a node was traced in, dotted; "" when it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path  # torch's mark for nodes it made itself

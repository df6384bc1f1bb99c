"""Norms of a graph, as one call each."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, scalar, value_of

KINDS = {aten.rms_norm.default: "rms", aten.layer_norm.default: "layer"}


@dataclass(frozen=True)
class Norm:
    """A call of a norm.

    Attributes:
        node: the call. kind: "rms" or "layer". x: what it reads.
        weight, bias: of its elements, None where there is none. eps: None where it is no number.
    """

    node: Node
    kind: str
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float | None

    @property
    def obstacle(self) -> str | None:
        """Why it is not a norm of each row [C], with a known eps, or None."""
        sizes = list(self.node.args[1])
        if sizes != [value_of(self.x).shape[-1]]:
            return f"it runs over the axes {sizes}"
        return "its eps is not a number" if self.eps is None else None


def norm_call(node: Node) -> Norm | None:
    """A node as a norm, None where it is none."""
    kind = KINDS.get(node.target)
    if kind is None:
        return None
    x = node.args[0]
    assert isinstance(x, Node)
    if kind == "rms":
        _, _, weight, eps = (*node.args, None, None)[:4]
        return Norm(node, kind, x, _node(weight), None, scalar(eps))
    _, _, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    return Norm(node, kind, x, _node(weight), _node(bias), scalar(eps))


def _node(argument: object) -> Node | None:
    return argument if isinstance(argument, Node) else None

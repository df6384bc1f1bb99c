"""How many calibration tokens a router sent to each expert.

Captured experts are dense: each sees every token, and its result is multiplied with the token's routing weight,
which is 0 where the expert was not chosen. Tokens with a weight other than 0 are those that reached it.
"""

from __future__ import annotations

from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, is_tensor, peel_casts, value_of
from optc.compiler.analysis.linears import Linear
from optc.passes.quantization.arithmetic.stream import Stream

FEW = 128
"""Fewer tokens than these say little about an expert's inputs."""
_MOST_STEPS = 64


def routing_weight(site: Linear) -> Node | None:
    """The routing weights [T, 1] that an expert's result is multiplied with, or None when it is no expert."""
    if site.index is None:
        return None
    pending, seen = [site.node], {site.node}
    for _ in range(_MOST_STEPS):
        if not pending:
            return None
        node = pending.pop(0)
        for user in node.users:
            if user.target is aten.mul.Tensor:
                other = user.args[1] if user.args[0] is node else user.args[0]
                if isinstance(other, Node) and is_tensor(other) and _is_column(other) and not _is_column(node):
                    return peel_casts(other)
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return None


def _is_column(node: Node) -> bool:
    last = value_of(node).shape[-1] if is_tensor(node) and value_of(node).dim() else None
    return isinstance(last, int) and last == 1


class RoutedTokens:
    """Counts of routed tokens, taken when the stream holds the routing weights."""

    def __init__(self) -> None:
        self._counts: dict[Node, int] = {}

    def look(self, stream: Stream, site: Linear) -> None:
        """Count the tokens of an expert, where its routing weights are known at this cut."""
        weight = routing_weight(site)
        if weight is not None and weight not in self._counts and stream.holds(weight):
            self._counts[weight] = sum(int((value != 0).sum()) for value in stream.values(weight))

    def count(self, site: Linear) -> int | None:
        """The tokens that reached an expert; None for a linear that is no expert, or when it was not seen."""
        weight = routing_weight(site)
        return None if weight is None else self._counts.get(weight)

"""Norms in front of linears, for fuse-decode: which one made an input, and whether linears alone read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import CASTS, COPIES, VIEWS, peel_casts, value_of, value_readers
from optc.compiler.analysis.linears import activation_format, brought_back, linear_site
from optc.compiler.analysis.norms import Norm, norm_call
from optc.compiler.analysis.rows import keeps_rows, same_rows
from optc.compiler.ir.program import Program

_FUSED = torch.ops.optc.fused_linear.default
_ROUNDED = torch.ops.optc.quantize_dynamic.default
_INPUTS = ("fp8",)
"""What `fused_linear` can round tokens to, by the scales of the tokens."""
_MOST_READERS = 2
"""Linears that may each compute the norm that they share: beyond, one that is computed once is cheaper."""


@dataclass(frozen=True)
class NormInFront:
    """A norm that a linear can compute itself.

    Attributes:
        kind: as `fused_linear` has it. source: what it reads, in the type that the linear computes in.
    """

    kind: str
    eps: float
    source: Node
    weight: Node | None
    bias: Node | None


def norm_in_front(program: Program, x: Node) -> NormInFront | str | None:
    """The norm that made the input of a linear; why it cannot be taken in; None where no norm made it."""
    norm = norm_call(peel_casts(same_rows(peel_casts(same_rows(x)))))
    if norm is None:
        return None
    dtype = value_of(x).dtype
    source = norm.x if value_of(norm.x).dtype == dtype else peel_casts(norm.x)
    reason = _obstacle(program, norm, source, dtype)
    if reason is not None or norm.eps is None:
        return f"{norm.node.name} is not taken in: {reason}"
    return NormInFront(norm.kind, norm.eps, source, norm.weight, norm.bias)


def _obstacle(program: Program, norm: Norm, source: Node, dtype: torch.dtype) -> str | None:
    """Why linears of type `dtype` cannot compute a norm of `source`, or None."""
    if norm.obstacle is not None:
        return norm.obstacle
    if value_of(source).dtype != dtype:
        return f"it reads {value_of(source).dtype}, the linear {dtype}"
    if any(item is not None and program.weight_of(item) is None for item in (norm.weight, norm.bias)):
        return "its weight is computed"
    found = _linears_behind(program, norm.node)
    if found is None:
        return "more than linears read it"
    return f"{found} linears read it: it is computed once for all" if found > _MOST_READERS else None


def _linears_behind(program: Program, norm: Node) -> int | None:
    """How many linears read a norm, None when anything else does."""
    count, pending = 0, [norm]
    while pending:
        current = pending.pop()
        for user in value_readers(current):
            if user.target in CASTS | COPIES | VIEWS and keeps_rows(user):
                pending.append(user)
                continue
            if rounds_tokens(user):
                pending += brought_back(user)
                continue
            linear = linear_site(program, user)
            if not (linear is not None and linear.input is current) and not _reads(user, current):
                return None
            count += 1
    return count


def rounds_tokens(node: Node) -> bool:
    """Whether a node makes the codes that a fused linear makes of its tokens."""
    return node.target is _ROUNDED and activation_format(node) in _INPUTS


def _reads(node: Node, x: Node) -> bool:
    """Whether a node is a fused linear of x."""
    return node.target is _FUSED and node.args[0] is x and node.all_input_nodes.count(x) == 1

"""Norms in front of linears, for fuse-decode: which one made an input, and whether linears alone read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import CASTS, COPIES, aten, peel_casts, scalar, value_of, value_readers
from optc.compiler.analysis.linears import linear_site
from optc.compiler.ir.program import Program
from optc.passes.fusion.decode_rows import RESHAPES, keeps_rows, same_rows

_FUSED = torch.ops.optc.fused_linear.default
NORMS = {aten.rms_norm.default: "rms", aten.layer_norm.default: "layer"}
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
    norm = peel_casts(same_rows(peel_casts(same_rows(x))))
    kind = NORMS.get(norm.target)
    if kind is None:
        return None
    reason, source = _norm_source(program, norm, value_of(x).dtype)
    weight, bias, eps = _norm_arguments(norm)
    if source is None or eps is None:
        return f"{norm.name} is not taken in: {reason}"
    return NormInFront(kind, eps, source, weight, bias)


def _norm_arguments(norm: Node) -> tuple[Node | None, Node | None, float | None]:
    if norm.target is aten.rms_norm.default:
        _, _, weight, eps = (*norm.args, None, None)[:4]
        return weight, None, scalar(eps)
    _, _, weight, bias, eps = (*norm.args, *(None, None, 1e-5)[len(norm.args) - 2 :])[:5]
    return weight, bias, scalar(eps)


def _norm_source(program: Program, norm: Node, dtype: torch.dtype) -> tuple[str, Node | None]:
    """(why not, None), or ("", what the norm reads in the type that the linear computes in)."""
    x, sizes = norm.args[0], norm.args[1]
    assert isinstance(x, Node)
    source = x if value_of(x).dtype == dtype else peel_casts(x)
    weight, bias, eps = _norm_arguments(norm)
    if list(sizes) != [value_of(x).shape[-1]]:
        return f"it runs over the axes {sizes}", None
    if value_of(source).dtype != dtype:
        return f"it reads {value_of(source).dtype}, the linear {dtype}", None
    if eps is None:
        return "its eps is not a number", None
    if any(item is not None and program.weight_of(item) is None for item in (weight, bias)):
        return "its weight is computed", None
    found = _linears_behind(program, norm)
    if found is None:
        return "more than linears read it", None
    if found > _MOST_READERS:
        return f"{found} linears read it: it is computed once for all", None
    return "", source


def _linears_behind(program: Program, norm: Node) -> int | None:
    """How many linears read a norm, None when anything else does."""
    count, pending = 0, [norm]
    while pending:
        current = pending.pop()
        for user in value_readers(current):
            if user.target in CASTS | COPIES | RESHAPES and keeps_rows(user):
                pending.append(user)
                continue
            linear = linear_site(program, user)
            if not (linear is not None and linear.input is current) and not _reads(user, current):
                return None
            count += 1
    return count


def _reads(node: Node, x: Node) -> bool:
    """Whether a node is a fused linear of x."""
    return node.target is _FUSED and node.args[0] is x and node.all_input_nodes.count(x) == 1

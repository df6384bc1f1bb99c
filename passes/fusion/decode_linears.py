"""The rule of fuse-decode for linears: norm in front; bias, activation, gate and residual behind."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from optc.compiler.analysis.activations import activation_behind
from optc.compiler.analysis.dataflow import (
    CASTS,
    COPIES,
    aten,
    is_tensor,
    peel,
    peel_casts,
    readers,
    scalar,
    sole_user,
    value_of,
    value_readers,
)
from optc.compiler.analysis.linears import Linear, linear_site
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call, replace_node
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.compiler.rewriting.weights import record_weight

_FUSED = torch.ops.optc.fused_linear.default
_RESHAPES = frozenset((
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim,
))  # fmt: skip
"""Ops that keep the order of elements."""
_NORMS = {aten.rms_norm.default: "rms", aten.layer_norm.default: "layer"}
_BETWEEN = frozenset((*_NORMS, aten.mul.Tensor, aten.div.Tensor))
_MOST_READERS = 2
"""Linears that may each compute the norm that they share: beyond, one that is computed once is cheaper."""


@dataclass
class _Site:
    """A linear and what is taken into its call.

    Attributes:
        x: what the call reads, in front of a norm that is taken in.
        end: the node whose value the call has.
        options: keyword arguments of the call.
        tensors: tensors of the call after x, weight, scale and zero.
        left: why a neighbour was not taken in.
    """

    linear: Linear
    x: Node
    end: Node
    tensors: dict[str, Node | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class FusedLinear(Rule):
    """[norm ->] linear [-> activation [-> * other half]] [-> + residual]  ->  optc.fused_linear"""

    def __init__(self) -> None:
        self.left: list[Miss] = []
        self._turned: dict[str, Node] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        linear = linear_site(program, node)
        if linear is None:
            return None
        reason = _obstacle(linear)
        if reason is not None:
            return Miss(node.name, reason)
        site = _Site(linear, linear.input, node, {"bias": linear.bias})
        _take_norm(program, site)
        _take_activation(site)
        _take_residual(site)
        self.left += [Miss(node.name, reason) for reason in site.left]
        return Match(site.end, {"site": site})

    def rewrite(self, program: Program, match: Match) -> None:
        site: _Site = match.found["site"]
        node, end, linear = site.linear.node, site.end, site.linear
        rank = value_of(node).dim()
        x = _with_rank(program, end, site.x, rank)
        residual = site.tensors.get("residual")
        tensors = {**site.tensors, "residual": residual and _with_rank(program, end, residual, rank)}
        names = ("norm_weight", "norm_bias", "bias", "residual")
        arguments = (x, self._weight(program, linear), None, None, *(tensors.get(name) for name in names))
        fused = insert_call(program, end, _FUSED, arguments, site.options)
        replace_node(program, end, _with_rank(program, end, fused, value_of(end).dim()))
        _erase_unread(program, node, fused)

    def _weight(self, program: Program, linear: Linear) -> Node:
        """The weight as [N, K]; one that is stored [K, N] is turned, once for all that read it."""
        if not linear.transposed:
            return linear.weight
        name = program.weight_of(linear.weight)
        assert name is not None
        if name not in self._turned:
            turned = f"{name}_transposed"
            record_weight(program, turned, program.contract.sources.get(name, (name,)))
            self._turned[name] = add_weight(program, turned, program.weight(name).detach().t().contiguous())
        return self._turned[name]


def _obstacle(linear: Linear) -> str | None:
    """Why a linear cannot become a call of the op, or None."""
    if linear.transposed and (linear.placeholder is not linear.weight):
        return "its weight is stored [K, N] and computed"
    if linear.activations:
        return f"its activations are rounded to {linear.activations}"
    x, weight = value_of(linear.input), value_of(linear.weight)
    if x.dtype != weight.dtype:
        return f"activations of {x.dtype} meet a weight of {weight.dtype}"
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != 1):
        return f"its input has shape {list(x.shape)}, not [tokens, K]"
    return None


# -- in front ---------------------------------------------------------------------------------


def _take_norm(program: Program, site: _Site) -> None:
    """Take in the norm that made the input, where linears alone read it."""
    norm = peel_casts(_same_rows(site.x))
    norm = peel_casts(_same_rows(norm))
    kind = _NORMS.get(norm.target)
    if kind is None:
        return
    reason, source = _norm_source(program, norm, value_of(site.x).dtype)
    if source is None:
        site.left.append(f"{norm.name} is not taken in: {reason}")
        return
    weight, bias, eps = _norm_arguments(norm)
    site.x = source
    site.tensors.update(norm_weight=weight, norm_bias=bias)
    site.options.update(norm=kind, eps=eps)


def _norm_arguments(norm: Node) -> tuple[Node | None, Node | None, float | None]:
    if norm.target is aten.rms_norm.default:
        _, _, weight, eps = (*norm.args, None, None)[:4]
        return weight, None, scalar(eps)
    _, _, weight, bias, eps = (*norm.args, None, None, 1e-5)[:5] if len(norm.args) < 5 else norm.args[:5]
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
            if user.target in CASTS | COPIES | _RESHAPES and _keeps_rows(user):
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


# -- behind -----------------------------------------------------------------------------------


def _take_activation(site: _Site) -> None:
    """Take in an activation function of the whole result, or of its first half, multiplied with the second."""
    start = _forward(site.end)
    halves = _halves(start)
    if halves is not None:
        _take_gate(site, *halves)
        return
    found = activation_behind(start)
    if found is not None:
        site.end, site.options["activation"] = found
    elif any(activation_behind(piece) for user in readers(start) for piece in readers(user) if _is_piece(piece)):
        site.left.append("an activation is of a part of its result, which it shares with other linears")


def _is_piece(node: Node) -> bool:
    return node.target is operator.getitem and is_tensor(node)


def _take_gate(site: _Site, gate: Node, up: Node) -> None:
    """act(gate) * up"""
    found = activation_behind(gate)
    if found is None:
        reversed_ = activation_behind(up) is not None
        site.left.append(
            "its second half is the gate, not its first" if reversed_ else "no known activation of its first half"
        )
        return
    activated, name = found
    product = sole_user(activated)
    factors = () if product is None else tuple(peel(item) for item in product.args if isinstance(item, Node))
    if (
        product is None
        or product.target is not aten.mul.Tensor
        or sole_user(up) is not product
        or set(factors) != {peel(activated), peel(up)}
    ):
        site.left.append(f"{name} of its first half is not multiplied with its second")
        return
    site.end = product
    site.options.update(activation=name, gated=True)


def _halves(node: Node) -> tuple[Node, Node] | None:
    """The two halves of the last axis, when these are all that is read of a node."""
    size = value_of(node).shape[-1]
    users = readers(node)
    if len(users) == 1 and users[0].target in (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default):
        pieces = [user for user in readers(users[0]) if user.target is operator.getitem]
        found = sorted(pieces, key=lambda piece: int(str(piece.args[1])))
    elif len(users) == 2 and all(user.target is aten.slice.Tensor for user in users):
        found = sorted(users, key=_start)
        if [_start(item) for item in found] != [0, size // 2]:
            return None
    else:
        return None
    if len(found) != 2 or any(value_of(item).shape[-1] * 2 != size for item in found):
        return None
    if any(value_of(item).shape[:-1] != value_of(node).shape[:-1] for item in found):
        return None
    return found[0], found[1]


def _start(node: Node) -> int:
    """Where a slice begins."""
    start = node.args[2]
    return start if isinstance(start, int) else 0


def _take_residual(site: _Site) -> None:
    """Take in the sum with another tensor of the same shape."""
    end = _forward(site.end)
    add = sole_user(end)
    if add is None or add.target is not aten.add.Tensor or add.kwargs.get("alpha", 1) != 1:
        between = _between(add)
        if between is not None:
            site.left.append(f"{between.target} stands between its result and what it is added to")
        return
    others = [item for item in add.args if item is not end]
    if len(others) != 1 or not is_tensor(others[0]):
        return
    other = others[0]
    if value_of(other).shape != value_of(end).shape or value_of(other).dtype != value_of(end).dtype:
        site.left.append(f"{other.name} is of another shape or type than what it is added to")
        return
    site.end, site.tensors["residual"] = add, other


def _between(node: Node | None) -> Node | None:
    """A norm or a factor whose result is added to something, None for other nodes."""
    found = None
    while node is not None and (node.target in _BETWEEN or node.target in CASTS | COPIES):
        found = node if node.target in _BETWEEN else found
        node = sole_user(node)
    return found if node is not None and node.target is aten.add.Tensor else None


def _forward(node: Node) -> Node:
    """The last node of a chain of copies and views, each the only reader of the one before, of the same rows."""
    while (user := sole_user(node)) is not None and user.target in COPIES | _RESHAPES | CASTS:
        if user.args[0] is not node or not _keeps_rows(user) or value_of(user).dtype != value_of(node).dtype:
            break
        if user.target is aten.dropout.default and user.args[2]:
            break
        node = user
    return node


def _erase_unread(program: Program, first: Node, last: Node) -> None:
    """Erase what was taken in, from `first` on, so that it counts as no reader of what other sites look at."""
    node = last.prev
    while True:
        before = node.prev
        if not node.users and node.op == "call_function":
            program.graph.erase_node(node)
        if node is first or node.op != "call_function":
            return
        node = before


# -- rows -------------------------------------------------------------------------------------


def _keeps_rows(node: Node) -> bool:
    """Whether a view has the rows [..., C] of what it views, one after the other."""
    source = node.args[0]
    assert isinstance(source, Node)
    return value_of(node).shape[-1:] == value_of(source).shape[-1:] and value_of(node).dim() >= 2


def _same_rows(node: Node) -> Node:
    """What a chain of copies and views shows the rows of."""
    while True:
        inner = peel(node)
        if inner.target not in _RESHAPES or not _keeps_rows(inner):
            return inner
        source = inner.args[0]
        assert isinstance(source, Node)
        node = source


def _with_rank(program: Program, before: Node, node: Node, rank: int) -> Node:
    """Rows as [N, C] or [1, N, C]."""
    value = value_of(node)
    if value.dim() == rank:
        return node
    if rank == 2:
        return insert_call(program, before, aten.reshape.default, (node, [-1, int(value.shape[-1])]))
    return insert_call(program, before, aten.unsqueeze.default, (node, 0))

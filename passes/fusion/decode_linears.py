"""The rule of fuse-decode for linears: norm in front; bias, activation, gate and residual behind."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from optc.compiler.analysis.activations import activation_behind
from optc.compiler.analysis.dataflow import (
    aten,
    is_tensor,
    peel,
    readers,
    sole_user,
    value_of,
)
from optc.compiler.analysis.linears import Linear, activation_format, linear_site, quantized_activation
from optc.compiler.analysis.rows import forward
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call, replace_call, replace_node
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.compiler.rewriting.weights import record_weight
from optc.passes.fusion.decode_norms import norm_in_front, rounds_tokens
from optc.passes.fusion.decode_residuals import residual_behind
from optc.passes.fusion.decode_rows import with_rank

_FUSED = torch.ops.optc.fused_linear.default
_CALLS: dict[str, tuple[Any, dict[str, str]]] = {
    "silu": (aten.silu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "relu": (aten.relu.default, {}),
}
"""Activation functions as ATen has them."""


@dataclass
class _Site:
    """A linear and what is taken into its call.

    Attributes:
        x: what the call reads, in front of a norm that is taken in.
        end: the node whose value the call has.
        options: keyword arguments of the call.
        tensors: tensors of the call after x, weight, scale and zero.
        parts: pieces of the result, each with the node that holds an activation function of it, and the function's name.
        left: why a neighbour was not taken in.
    """

    linear: Linear
    x: Node
    end: Node
    tensors: dict[str, Node | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    parts: list[tuple[Node, Node, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class FusedLinear(Rule):
    """[norm -> fp8 ->] linear [-> activation [-> * other half]] [-> + residual]  ->  optc.fused_linear"""

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
        _take_rounding(site)
        _take_norm(program, site)
        _take_activation(site)
        _take_residual(site)
        self.left += [Miss(node.name, reason) for reason in site.left]
        return Match(site.end, {"site": site})

    def rewrite(self, program: Program, match: Match) -> None:
        site: _Site = match.found["site"]
        node, end, linear = site.linear.node, site.end, site.linear
        rank = value_of(node).dim()
        x = with_rank(program, end, site.x, rank)
        residual = site.tensors.get("residual")
        tensors = {**site.tensors, "residual": residual and with_rank(program, end, residual, rank)}
        names = ("norm_weight", "norm_bias", "bias", "residual")
        arguments = (x, self._weight(program, linear), None, None, *(tensors.get(name) for name in names))
        fused = insert_call(program, end, _FUSED, arguments, site.options)
        replace_node(program, end, with_rank(program, end, fused, value_of(end).dim()))
        _erase_unread(program, node, fused)
        for piece, last, name in site.parts:
            if last.args[0] is not piece:  # spelled out: one call instead
                target, options = _CALLS[name]
                replace_call(program, last, target, (piece,), options)

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
    rounding = quantized_activation(linear.input)
    if rounding is not None and not rounds_tokens(rounding):
        return f"its activations are rounded to {linear.activations}, not to fp8 by the scale of each token"
    x, weight = value_of(linear.input), value_of(linear.weight)
    if x.dtype != weight.dtype:
        return f"activations of {x.dtype} meet a weight of {weight.dtype}"
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != 1):
        return f"its input has shape {list(x.shape)}, not [tokens, K]"
    return None


def _take_rounding(site: _Site) -> None:
    """Take in the rounding of tokens."""
    rounding = quantized_activation(site.x)
    if rounding is not None:
        site.options["inputs"] = activation_format(rounding)
        (site.x,) = rounding.all_input_nodes


def _take_norm(program: Program, site: _Site) -> None:
    """Take in the norm that made the input, where linears alone read it."""
    norm = norm_in_front(program, site.x)
    if isinstance(norm, str):
        site.left.append(norm)
    elif norm is not None:
        site.x = norm.source
        site.tensors.update(norm_weight=norm.weight, norm_bias=norm.bias)
        site.options.update(norm=norm.kind, eps=norm.eps)


# -- behind -----------------------------------------------------------------------------------


def _take_activation(site: _Site) -> None:
    """Take in an activation function of the whole result, or of its first half, multiplied with the second."""
    start = forward(site.end)
    halves = _halves(start)
    if halves is not None:
        _take_gate(site, *halves)
        return
    found = activation_behind(start)
    if found is not None:
        site.end, site.options["activation"] = found
        return
    pieces = [piece for user in readers(start) for piece in readers(user) if _is_piece(piece)]
    site.parts = [(piece, *part) for piece in pieces if (part := activation_behind(piece)) is not None]
    if site.parts:
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
    found = residual_behind(site.end)
    if isinstance(found, str):
        site.left.append(found)
    elif found is not None:
        site.end, site.tensors["residual"] = found


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

"""The rule of fuse-decode for attention: rotary embedding, and norms of heads, of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import (
    COPIES,
    MOVES,
    Sizes,
    aten,
    evaluate,
    leaves,
    peel_casts,
    scalar,
    sole_user,
    value_of,
)
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call
from optc.compiler.rewriting.passes import Match, Miss, Rule

optc = torch.ops.optc
_ATTENTION, _ROTARY = optc.paged_attention_.default, optc.rotary.default


@dataclass(frozen=True)
class _Heads:
    """Queries or keys in front of what is taken in.

    Attributes:
        rotation: the rotary embedding of them.
        source: what it reads, or what its norm reads.
        heads_axis: of `source`: 1 of [1, H, N, D], or 2 of [1, N, H, D].
        norm: the norm of each head, whose result the rotation reads; None for none.
    """

    rotation: Node
    source: Node
    heads_axis: int = 1
    norm: Node | None = None

    @property
    def eps(self) -> float:
        """Of the norm; 0 without one."""
        return 0.0 if self.norm is None else scalar(self.norm.args[3]) or 0.0


class RotaryAttention(Rule):
    """paged_attention_(rotary(norm(q)), rotary(norm(k)), v, ...)  ->  rotary_paged_attention_(q, k, v, ...)"""

    def __init__(self) -> None:
        self.left: list[Miss] = []

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not _ATTENTION:
            return None
        rotations = [_rotation(item) for item in node.args[:2] if isinstance(item, Node)]
        for what, rotation in zip(("queries", "keys"), rotations, strict=True):
            if rotation is None:
                return Miss(node.name, f"its {what} are not the result of one rotary embedding")
        left, right = (rotation for rotation in rotations if rotation is not None)
        if left.args[1:] != right.args[1:] or left.kwargs != right.kwargs:
            return Miss(node.name, "queries and keys are rotated by different angles")
        dtype = value_of(node).dtype
        query, key = _heads(program, left, dtype), _heads(program, right, dtype)
        if (query.norm is None) != (key.norm is None) or query.eps != key.eps:
            query, key = _Heads(left, _input(left, dtype)), _Heads(right, _input(right, dtype))
            self.left.append(Miss(node.name, "queries and keys are normalized differently: the norms stay apart"))
        return Match(node, {"query": query, "key": key})

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        query: _Heads = match.found["query"]
        key: _Heads = match.found["key"]
        position, inv_freq = query.rotation.args[1:]
        tensors = [_by_token(program, node, heads) for heads in (query, key)]
        place = insert_call(program, node, aten.select.int, (position, 0, 0))
        weights = [None if heads.norm is None else heads.norm.args[2] for heads in (query, key)]
        value = node.args[2]
        assert isinstance(value, Node)
        arguments = (*tensors, uncopied(value), *node.args[3:], place, inv_freq, *weights)
        knobs = {**query.rotation.kwargs, "eps": query.eps, **node.kwargs}
        replace_call(program, node, optc.rotary_paged_attention_.default, arguments, knobs)


def _rotation(node: Node) -> Node | None:
    """The rotary embedding [1, H, N, D] whose elements a node has as [N, H, D], or None.

    It may be computed in float32, from and to the type of the attention, which rounds cos and sin to that type.
    """
    found = leaves(node, lambda current: current.target in MOVES | COPIES and not _drops(current))
    rotation = peel_casts(found[0]) if len(found) == 1 else None
    if rotation is None or rotation.target is not _ROTARY:
        return None
    if value_of(_input(rotation, value_of(node).dtype)).dtype != value_of(node).dtype:
        return None
    sizes = Sizes()
    shape = sizes.shape(rotation)
    if len(shape) != 4 or shape[0] != 1:
        return None
    probe = torch.arange(torch.Size(shape).numel()).reshape(shape)
    moved = evaluate(node, {found[0]: probe}, sizes)
    return rotation if torch.equal(moved, probe[0].transpose(0, 1)) else None


def _drops(node: Node) -> bool:
    return node.target is aten.dropout.default and bool(node.args[2])


def _input(rotation: Node, dtype: torch.dtype) -> Node:
    """What a rotation reads, in front of a cast where that has the type."""
    source = rotation.args[0]
    assert isinstance(source, Node)
    return source if value_of(source).dtype == dtype else peel_casts(source)


def _heads(program: Program, rotation: Node, dtype: torch.dtype) -> _Heads:
    """What a rotation reads, in front of a norm of each head where there is one."""
    source = _input(rotation, dtype)
    norm, axis = peel_casts(source), 1
    if norm.target is aten.transpose.int and sorted(norm.args[1:]) == [1, 2]:
        inner = norm.args[0]
        assert isinstance(inner, Node)
        norm, axis = peel_casts(inner), 2
    plain = _Heads(rotation, source)
    if norm.target is not aten.rms_norm.default:
        return plain
    x, sizes, weight, eps = (*norm.args, None, None)[:4]
    assert isinstance(x, Node)
    if value_of(x).dtype != value_of(source).dtype:  # computed in float32, from and to a 16-bit type
        x = peel_casts(x)
    if not isinstance(weight, Node) or program.weight_of(weight) is None or scalar(eps) is None:
        return plain
    if list(sizes) != [value_of(source).shape[-1]] or value_of(x).dtype != value_of(source).dtype:
        return plain
    return _Heads(rotation, x, axis, norm)


def _by_token(program: Program, before: Node, heads: _Heads) -> Node:
    """Queries or keys as [N, H, D], a view."""
    row = insert_call(program, before, aten.select.int, (heads.source, 0, 0))
    return row if heads.heads_axis == 2 else insert_call(program, before, aten.transpose.int, (row, 0, 1))


def take_factor(node: Node) -> None:
    """attention(q * number, k, scale)  ->  attention(q, k, scale * number), where nothing else reads the product."""
    query = node.args[0]
    assert isinstance(query, Node)
    found = leaves(query, lambda current: current.target in MOVES | COPIES and not _drops(current))
    product = found[0] if len(found) == 1 else None
    if product is None or product.target is not aten.mul.Tensor:
        return
    source, number = product.args[0], scalar(product.args[1])
    if number is None or not isinstance(source, Node) or value_of(source).dtype != value_of(product).dtype:
        return
    chain: Node | None = product
    while chain is not None and chain is not node:
        chain = sole_user(chain)
    scale = scalar(node.kwargs["scale"])
    if chain is not None and scale is not None:
        product.replace_all_uses_with(source)
        node.update_kwarg("scale", scale * number)


def uncopied(node: Node) -> Node:
    """What a copy that only lays its input out anew is of: attention takes any strides."""
    while node.target is aten.contiguous.default:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node

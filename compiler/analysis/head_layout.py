"""Two layouts of attention heads: [B,H,S,D], as the dialect has them, and [B,S,H*D], as linears make them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from optc.compiler.analysis.dataflow import COPIES, VIEWS, aten, peel, value_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call

_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)


def call_of(node: object, *targets: object) -> Node | None:
    """`node` when it is a call of one of these targets."""
    return node if isinstance(node, Node) and node.op == "call_function" and node.target in targets else None


def flat_heads(program: Program, before: Node, x: Node) -> Node:
    """x [B,H,S,D] as [B,S,H*D], by undoing its transpose and view where they are there.

    A norm over the last axis trades places with the transpose.
    """
    inner = _heads_last(program, before, x)
    view = call_of(inner, *VIEWS)
    if view is not None:
        batch, size, heads, width = value_of(inner).shape
        if _text(view.args[0]) == [str(batch), str(size), str(heads * width)]:
            return view.args[0]
    return insert_call(program, before, aten.flatten.using_ints, (inner, 2, 3))


def _heads_last(program: Program, before: Node, x: Node) -> Node:
    """x [B,H,S,D] as [B,S,H,D]."""
    x = peel(x)
    if _swaps_heads(x):
        return peel(x.args[0])
    norm = call_of(x, aten.rms_norm.default)
    if norm is not None and len(norm.args[1]) == 1 and _swaps_heads(peel(norm.args[0])):
        inner = peel(norm.args[0]).args[0]
        return insert_call(program, before, aten.rms_norm.default, (inner, *norm.args[1:]), dict(norm.kwargs))
    return insert_call(program, before, aten.transpose.int, (x, 1, 2))


def _swaps_heads(node: object) -> bool:
    transpose = call_of(node, aten.transpose.int)
    return transpose is not None and transpose.args[1:] in ((1, 2), (2, 1))


def packed_source(parts: Sequence[Node]) -> Node | None:
    """The tensor [..., N] that `parts`, laid in a row along the last axis, are all of; else None."""
    found = [_piece(part) for part in parts]
    sources, end = set(), 0
    for piece in found:
        if piece is None or piece[1] != end:
            return None
        source, _, end = piece
        sources.add(source)
    source = sources.pop()
    return source if not sources and value_of(source).shape[-1] == end else None


def _piece(part: Node) -> tuple[Node, int, int] | None:
    """(source, start, end) when a node is source[..., start:end]."""
    part = peel(part)
    item = call_of(part, operator.getitem)
    split = call_of(item.args[0], *_SPLITS) if item is not None else None
    if item is not None and split is not None:
        sizes: Any = [piece.shape[-1] for piece in split.meta["val"]]
        source, axis = split.args[0], (*split.args, split.kwargs.get("dim", 0))[2]
        if axis not in (-1, value_of(source).dim() - 1):
            return None
        index: Any = item.args[1]
        return source, sum(sizes[:index]), sum(sizes[: index + 1])
    cut = call_of(part, aten.slice.Tensor)
    if cut is None:
        return None
    source, axis, start, _, step = list(cut.args) + [0, None, None, 1][len(cut.args) - 1 :]
    last, start = value_of(source).dim() - 1, start or 0
    plain = axis in (-1, last) and step == 1 and isinstance(start, int) and start >= 0
    return (source, start, start + int(value_of(part).shape[last])) if plain else None


def merged_heads(reader: Node, out: Node) -> Node | None:
    """The node that is out [B,H,S,D] as [B,S,H*D]: transpose, perhaps a copy, and a view; else None."""
    if not _swaps_heads(reader):
        return None
    batch, heads, size, width = value_of(out).shape
    node = reader
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target in COPIES:
            continue
        flat = [str(batch), str(size), str(heads * width)]
        return node if call_of(node, *VIEWS) and _text(node) == flat else None
    return None


def _text(node: Node) -> list[str]:
    return [str(size) for size in value_of(node).shape]

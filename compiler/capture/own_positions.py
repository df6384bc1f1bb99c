"""Positions that a model counts by itself, made an input.

BART, OPT's elders and others look a row of a table up for each token by `arange(length)`, or cut the table's first rows.
A cache continues a sequence, so the graph must take positions as an input. What is looked up is found by dataflow: rows
number i + c of a table, for token i, whatever the ids are. The lookups are made again with `position_ids + c`, [B, S] in
place of [S] or [1, S], which is the same where positions count from 0.

What is not found so (slopes of ALiBi, masks) stays as it is. Passes that need positions prove them by trial
(`rewriting/tokenwise`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import (
    CASTS,
    COPIES,
    Sizes,
    aten,
    evaluate,
    inputs_of,
    is_tensor,
    readers,
    value_of,
)
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead, infer_meta, insert_call

_ATTENTION = torch.ops.optc.attention.default
_EMBEDDING = aten.embedding.default
_SELECTS = {_EMBEDDING: (0, 1), aten.index_select.default: (0, 2), aten.index.Tensor: (0, 1)}
"""Lookups of rows: places of the table and of the index among the arguments."""
_COUNTERS = frozenset((aten.arange.default, aten.arange.start, aten.arange.start_step))
_MAKERS = frozenset(
    (aten.ones.default, aten.ones_like.default, aten.full.default, aten.full_like.default, aten.zeros.default)
)
_POINTWISE = frozenset(
    (
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.cumsum.default,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.view.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.repeat.default,
        aten.clamp.default,
    )
)


@dataclass(frozen=True)
class _Lookup:
    """`node` holds rows i + shift of `table` for token i."""

    node: Node
    table: Node
    shift: int


def lift_positions(program: Program) -> int:
    """Read positions from the input in place, where the graph counts them; the number of lookups."""
    drop_dead(program)  # asserts on types read what is looked up
    ids, positions = program.user_inputs()[:2]
    length = value_of(ids).shape[1]
    found = [lookup for node in program.graph.nodes if (lookup := _lookup(program, node, ids, length)) is not None]
    done = 0
    for lookup in found:
        done += _lift(program, lookup, ids, positions)
    if done:
        drop_dead(program)
        program.exported.graph_module.recompile()
    return done


def drop_whole_padding(program: Program) -> int:
    """Take masks of ones, which some models make for themselves, off `optc.attention` in place; the number of calls."""
    found = [node for node in program.calls(_ATTENTION) if node.args[3] is not None and _is_ones(node.args[3])]
    for node in found:
        node.update_arg(3, None)
    if found:
        drop_dead(program)
        program.exported.graph_module.recompile()
    return len(found)


def _is_ones(node: Any) -> bool:
    while isinstance(node, Node) and node.target in CASTS | COPIES:
        node = node.args[0]
    if not isinstance(node, Node):
        return False
    return node.target in (aten.ones.default, aten.ones_like.default) or (
        node.target is aten.full.default and node.args[1] in (1, True)
    )


def _lookup(program: Program, node: Node, ids: Node, length: Any) -> _Lookup | None:
    if node.op != "call_function" or not is_tensor(node):
        return None
    if node.target is aten.slice.Tensor:
        return _cut(program, node, length)
    if node.target not in _SELECTS:
        return None
    place, index_place = _SELECTS[node.target]
    table, index = node.args[place], node.args[index_place]
    if isinstance(index, list | tuple):
        (index,) = index if len(index) == 1 else (None,)
    if not (isinstance(table, Node) and isinstance(index, Node)) or _weight_behind(program, table) is None:
        return None
    if not _counts(index, ids) or value_of(index).shape[-1] != length:
        return None
    shift = _shift(index, ids)
    return None if shift is None else _Lookup(node, table, shift)


def _cut(program: Program, node: Node, length: Any) -> _Lookup | None:
    """table[c : c + S]"""
    table = node.args[0]
    given: dict[int, Any] = dict(enumerate(node.args))
    dim, start, step = given.get(1, 0), given.get(2), given.get(4, 1)
    if not isinstance(table, Node) or _weight_behind(program, table) is None or value_of(table).dim() != 2:
        return None
    if dim != 0 or step != 1 or not isinstance(start, int | None) or value_of(node).shape[0] != length:
        return None
    return None if isinstance(length, int) else _Lookup(node, table, start or 0)


def _weight_behind(program: Program, node: Node) -> str | None:
    while node.op == "call_function" and node.target in CASTS | COPIES:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return program.weight_of(node)


def _counts(index: Node, ids: Node) -> bool:
    """Whether an index is made of counters alone, and of nothing that a token says."""
    seen, stack, counters = set[Node](), [index], 0
    while stack:
        node = stack.pop()
        if node in seen or not is_tensor(node):
            continue
        seen.add(node)
        if node.target in _COUNTERS:
            counters += 1
        elif node.target in _MAKERS:
            counters += node.target is aten.ones.default or node.target is aten.ones_like.default
        elif node.op == "call_function" and node.target in _POINTWISE | CASTS | COPIES:
            stack += inputs_of(node)
        else:
            return False
    return counters > 0


def _shift(index: Node, ids: Node) -> int | None:
    """c where the index is i + c for token i, tried at small sizes; None where it is something else."""
    sizes = Sizes()
    sizes.number(value_of(ids).shape[0])
    count = sizes.number(value_of(ids).shape[1])
    symbol: Any = value_of(ids).shape[1]
    sizes.numbers[symbol.node.expr] = count = count + 5
    given = {node: torch.zeros(sizes.shape(node), dtype=torch.long) for node in (ids,)}
    value = evaluate(index, given, sizes)
    shift = value.reshape(-1, count)[0, 0]
    wanted = torch.arange(count) + shift
    return int(shift) if torch.equal(value, wanted.expand_as(value)) else None


def _lift(program: Program, lookup: _Lookup, ids: Node, positions: Node) -> bool:
    """Look rows up by the input, [B, S, C], and let what follows take them; False where a reader needs the old shape."""
    node = lookup.node
    batch, rank = value_of(ids).shape[0], value_of(node).dim()
    if rank == 3 and value_of(node).shape[0] == batch:
        pass
    elif rank not in (2, 3) or not all(_broadcasts(user, node, value_of(ids).shape) for user in readers(node)):
        return False
    index = positions
    if lookup.shift:
        index = insert_call(program, node, aten.add.Tensor, (index, lookup.shift))
    new = insert_call(program, node, _EMBEDDING, (lookup.table, index))
    _absorb(program, node, new, rank)
    return True


_ALONG = CASTS | COPIES | {operator.getitem, aten.neg.default, aten.sin.default, aten.cos.default}
"""Calls on one tensor that take all axes as they come."""
_ON_AXIS = {
    aten.unsqueeze.default: 1,
    aten.chunk.default: 2,
    aten.split.Tensor: 2,
    aten.slice.Tensor: 1,
    aten.stack.default: 1,
    aten.cat.default: 1,
}
"""Calls that act on one axis, and where among the arguments it stands."""
_PRODUCTS = (aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor)


def _broadcasts(user: Node, node: Node, shape: Any, lifted: tuple[Node, ...] = ()) -> bool:
    """Whether a reader of [S, C], or of [1, ..., S, C] that was made of it, makes the same with the batch in front.

    Args:
        lifted: what was made of the lookup on the way to `node`.
    """
    rank = value_of(node).dim() if is_tensor(node) else 0
    lifted = (*lifted, node)
    if user.target in _PRODUCTS:
        found = value_of(user).shape
        return len(found) == max(rank, 3) and found[0] == shape[0] and shape[1] in found[1:]
    if rank == 2 and (user.target is not aten.unsqueeze.default or user.args[1] != 0):
        return user.target in CASTS | COPIES and all(_broadcasts(item, user, shape, lifted) for item in readers(user))
    if user.target is aten.expand.default and rank == 3:
        return value_of(user).dim() == 3
    return _is_along(user, node, rank, lifted) and all(_broadcasts(item, user, shape, lifted) for item in readers(user))


def _is_along(user: Node, node: Node, rank: int, lifted: tuple[Node, ...]) -> bool:
    """Whether a call lets a first axis of 1 be the batch."""
    if user.target is aten.reshape_as.default:
        return user.args[1] in lifted
    if user.target not in _ON_AXIS:
        return user.target in _ALONG
    if any(item is not node for item in inputs_of(user)):
        return False
    place = _ON_AXIS[user.target]
    axis = user.args[place] if len(user.args) > place else 0
    count = rank + (user.target in (aten.unsqueeze.default, aten.stack.default))
    return rank == 2 or (isinstance(axis, int) and axis % count != 0)


def _absorb(program: Program, old: Node, new: Node, rank: int) -> None:
    """Let the readers of `old`, of `rank` axes, read `new` (with the batch in front); axes that were added for `old` are
    there already."""
    for user in list(old.users):
        if user.target is aten.expand.default or (user.target is aten.unsqueeze.default and rank == 2):
            _absorb(program, user, new, 3)
            continue
        user.replace_input_with(old, new)
        infer_meta(program, user)
        if user.target in _ALONG or user.target in _ON_AXIS or user.target is aten.reshape_as.default:
            found = user.meta["val"]
            _absorb(program, user, user, rank if rank == 2 or not isinstance(found, Tensor) else found.dim())
    if old is not new and not old.users:
        program.graph.erase_node(old)

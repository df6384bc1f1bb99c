"""Lowerings of views, slices, joins and constructors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import Lowering, Walker, argument, axis_of

_aten = torch.ops.aten
_END = 2**63 - 1


def _shape(node: Node) -> list[Any]:
    return list(node.meta["val"].shape)


def _constant_shape(source: Sequence[Any], target: Sequence[Any]) -> list[int] | None:
    """The target as constants, where an axis is copied (0) and at most one inferred (-1); else None."""
    if any(isinstance(size, int) and size == 0 for size in target):
        return None
    plan: list[int] = []
    for axis, size in enumerate(target):
        if isinstance(size, int):
            plan.append(size)
        else:
            plan.append(0 if axis < len(source) and str(source[axis]) == str(size) else -1)
    return plan if plan.count(-1) <= 1 else None


def _reshape(walker: Walker, node: Node, sizes: Callable[[], ir.Value]) -> ir.Value:
    """Reshape args[0] to the shape of `node`, by `sizes()` where constants cannot say it."""
    source = node.args[0]
    plan = _constant_shape(_shape(source), _shape(node))
    if plan is not None:
        return walker.op("Reshape", [walker.value(source), walker.constant(plan)])
    return walker.op("Reshape", [walker.value(source), sizes()], {"allowzero": 1})


def _view(walker: Walker, node: Node) -> ir.Value:
    return _reshape(walker, node, lambda: walker.sizes(node.args[1]))


def _like(walker: Walker, node: Node) -> ir.Value:
    """view_as, expand_as."""
    kind = "Expand" if node.target is _aten.expand_as.default else "Reshape"
    return walker.op(kind, [walker.value(node.args[0]), walker.op("Shape", [walker.value(node.args[1])])])


def _middle_replaced(walker: Walker, source: Node, first: int, last: int, middle: ir.Value) -> ir.Value:
    """The shape of `source` with the axes first..last replaced."""
    value, rank = walker.value(source), len(_shape(source))
    ends = [(0, first), (last + 1, rank)]
    before, after = ([walker.op("Shape", [value], {"start": i, "end": j})] if j > i else [] for i, j in ends)
    return walker.op("Concat", [*before, middle, *after], {"axis": 0})


def _flatten(walker: Walker, node: Node) -> ir.Value:
    source = node.args[0]
    first, last = (
        axis_of(source, int(argument(node, i, name, default)))
        for i, name, default in ((1, "start_dim", 0), (2, "end_dim", -1))
    )
    return _reshape(walker, node, lambda: _middle_replaced(walker, source, first, last, walker.constant([-1])))


def _unflatten(walker: Walker, node: Node) -> ir.Value:
    source, sizes = node.args[0], node.args[2]
    axis = axis_of(source, int(node.args[1]))
    return _reshape(walker, node, lambda: _middle_replaced(walker, source, axis, axis, walker.sizes(sizes)))


def _transpose(walker: Walker, node: Node) -> ir.Value:
    rank = len(_shape(node))
    order = list(range(rank))
    if node.target is _aten.permute.default:
        order = [int(axis) % rank for axis in node.args[1]]
    else:
        first, second = (0, 1) if node.target is _aten.t.default else (int(a) % rank for a in node.args[1:3])
        if rank > 1:
            order[first], order[second] = order[second], order[first]
    return walker.op("Transpose", [walker.value(node.args[0])], {"perm": order})


def _unsqueeze(walker: Walker, node: Node) -> ir.Value:
    axis = int(node.args[1]) % len(_shape(node))
    return walker.op("Unsqueeze", [walker.value(node.args[0]), walker.constant([axis])])


def _squeeze(walker: Walker, node: Node) -> ir.Value:
    source = node.args[0]
    assert isinstance(source, Node)
    given = argument(node, 1, "dim")
    rank = len(_shape(source))
    axes = range(rank) if given is None else [given] if isinstance(given, int) else given
    drop = [axis % rank for axis in axes if isinstance(size := _shape(source)[axis], int) and size == 1]
    return walker.op("Squeeze", [walker.value(source), walker.constant(drop)]) if drop else walker.value(source)


def _expand(walker: Walker, node: Node) -> ir.Value:
    sizes = [1 if size == -1 else size for size in node.args[1]]
    return walker.op("Expand", [walker.value(node.args[0]), walker.sizes(sizes)])


def _repeat(walker: Walker, node: Node) -> ir.Value:
    source, repeats = node.args[:2]
    value = walker.value(source)
    missing = len(repeats) - len(_shape(source))
    if missing:
        value = walker.op("Unsqueeze", [value, walker.constant(list(range(missing)))])
    return walker.op("Tile", [value, walker.sizes(repeats)])


def _slice(walker: Walker, node: Node) -> ir.Value:
    axis = int(argument(node, 1, "dim", 0)) % len(_shape(node))
    start, end, step = (
        argument(node, i, name, default) for i, name, default in ((2, "start", None), (3, "end", None), (4, "step", 1))
    )
    bounds = [walker.size(0 if start is None else start), walker.size(_END if end is None else end)]
    return walker.op("Slice", [walker.value(node.args[0]), *bounds, walker.constant([axis]), walker.size(step)])


def _select(walker: Walker, node: Node) -> ir.Value:
    source, axis, index = node.args[:3]
    rank = len(_shape(source))
    value = walker.scalar(index)
    return walker.op("Gather", [walker.value(source), value], {"axis": int(axis) % rank})


def _split(walker: Walker, node: Node) -> tuple[ir.Value, ...]:
    """chunk, split, split_with_sizes: sizes are read off the results."""
    parts, value = node.meta["val"], walker.value(node.args[0])
    axis = int(argument(node, 2, "dim", 0)) % parts[0].dim()
    sizes: Any = [part.shape[axis] for part in parts]
    if len(parts) == 1:
        return (value,)
    if not all(isinstance(size, int) for size in sizes):
        sizes = node.args[1]
    return walker.op("Split", [value, walker.sizes(sizes)], {"axis": axis}, outputs=len(parts))


def known_parts(node: Node) -> str | None:
    """A predicate for chunk and split: the sizes of their parts are constants."""
    axis = int(argument(node, 2, "dim", 0))
    known = all(isinstance(part.shape[axis], int) for part in node.meta["val"])
    return None if known else "the sizes of the parts depend on the input"


def _unbind(walker: Walker, node: Node) -> tuple[ir.Value, ...]:
    source = node.args[0]
    axis = int(argument(node, 1, "dim", 0)) % len(_shape(source))
    value = walker.value(source)
    return tuple(
        walker.op("Gather", [value, walker.constant(index)], {"axis": axis}) for index in range(len(node.meta["val"]))
    )


def _cat(walker: Walker, node: Node) -> ir.Value:
    dtype = node.meta["val"].dtype
    # torch.cat lets empty 1-D tensors through; they add nothing
    parts = [item for item in node.args[0] if _shape(item) != [0]]
    axis = int(argument(node, 1, "dim", 0)) % len(_shape(node))
    return walker.op("Concat", [walker.value(item, dtype) for item in parts], {"axis": axis})


def _flip(walker: Walker, node: Node) -> ir.Value:
    axes = [int(axis) % len(_shape(node)) for axis in node.args[1]]
    bounds = [walker.constant([item] * len(axes)) for item in (-1, -_END)]
    back = walker.constant([-1] * len(axes))
    return walker.op("Slice", [walker.value(node.args[0]), *bounds, walker.constant(axes), back])


def _stack(walker: Walker, node: Node) -> ir.Value:
    dtype = node.meta["val"].dtype
    axis = int(argument(node, 1, "dim", 0)) % len(_shape(node))
    parts = [walker.op("Unsqueeze", [walker.value(item, dtype), walker.constant([axis])]) for item in node.args[0]]
    return walker.op("Concat", parts, {"axis": axis})


def _sym_size(walker: Walker, node: Node) -> ir.Value:
    axis = axis_of(node.args[0], int(node.args[1]))
    return walker.op("Shape", [walker.value(node.args[0])], {"start": axis, "end": axis + 1})


def _arange(walker: Walker, node: Node) -> ir.Value:
    dtype = node.meta["val"].dtype
    start, end, step = 0, node.args[0], 1
    if node.target is not _aten.arange.default:
        start, end = node.args[:2]
        step = argument(node, 2, "step", 1)
    bounds = (start, end, step)
    if any(isinstance(item, float) for item in bounds):
        return walker.op("Range", [walker.value(item, dtype) for item in bounds])
    out = walker.op("Range", [walker.scalar(item) for item in bounds])
    return out if dtype is torch.int64 else walker.cast(out, dtype)


def no_truncation(node: Node) -> str | None:
    """A predicate for arange: fractions in the bounds of integers are not lowered."""
    bounds = [*node.args, node.kwargs.get("step")]
    if any(isinstance(item, float) for item in bounds) and not node.meta["val"].dtype.is_floating_point:
        return "an integer range with fractional bounds is not lowered"
    return None


def _full(walker: Walker, node: Node) -> ir.Value:
    """full, zeros, ones and their _like and new_ forms: a constant expanded to the result's shape."""
    name = str(node.target).split(".")[1]
    val = node.meta["val"]
    fills = {"zeros": 0, "ones": 1, "empty": 0}
    fill: Any = next((value for key, value in fills.items() if key in name), None)
    like = name.endswith("_like")
    if fill is None:
        fill = node.args[2] if name.startswith("new_") else node.args[1]
    constant = walker.value(fill, val.dtype)
    if all(isinstance(size, int) for size in val.shape):
        sizes = walker.constant([int(size) for size in val.shape], torch.int64)
    elif like:
        sizes = walker.op("Shape", [walker.value(node.args[0])])
    else:
        sizes = walker.sizes(node.args[1] if name.startswith("new_") else node.args[0])
    return walker.op("Expand", [constant, sizes])


def _scalar_tensor(walker: Walker, node: Node) -> ir.Value:
    return walker.value(node.args[0], node.meta["val"].dtype)


def _triangle(upper: int) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        diagonal = walker.scalar(argument(node, 1, "diagonal", 0))
        dtype = node.meta["val"].dtype
        work = dtype if dtype.is_floating_point else torch.int64  # ONNX Runtime has no kernel for the others
        out = walker.op("Trilu", [walker.value(node.args[0], work), diagonal], {"upper": upper})
        return out if work is dtype else walker.cast(out, dtype)

    return lower


def _table() -> dict[Any, Lowering]:
    table: dict[Any, Lowering] = {}
    for lower, targets in (
        (_view, (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)),
        (_flatten, (_aten.flatten.using_ints,)),
        (_unflatten, (_aten.unflatten.int,)),
        (_like, (_aten.view_as.default, _aten.expand_as.default)),
        (_transpose, (_aten.transpose.int, _aten.permute.default, _aten.t.default)),
        (_unsqueeze, (_aten.unsqueeze.default,)),
        (_squeeze, (_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims)),
        (_expand, (_aten.expand.default,)),
        (_repeat, (_aten.repeat.default,)),
        (_slice, (_aten.slice.Tensor,)),
        (_select, (_aten.select.int,)),
        (_split, (_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default)),
        (_unbind, (_aten.unbind.int,)),
        (_flip, (_aten.flip.default,)),
        (_cat, (_aten.cat.default,)),
        (_stack, (_aten.stack.default,)),
        (_sym_size, (_aten.sym_size.int,)),
        (_arange, (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)),
        (
            _full,
            (
                _aten.full.default,
                _aten.zeros.default,
                _aten.ones.default,
                _aten.empty.memory_format,
                _aten.zeros_like.default,
                _aten.ones_like.default,
                _aten.full_like.default,
                _aten.new_zeros.default,
                _aten.new_ones.default,
                _aten.new_full.default,
                _aten.new_empty.default,
                _aten.empty_like.default,
            ),
        ),
        (_scalar_tensor, (_aten.scalar_tensor.default,)),
        (_triangle(1), (_aten.triu.default,)),
        (_triangle(0), (_aten.tril.default,)),
    ):
        table.update(dict.fromkeys(targets, lower))
    return table


TABLE = _table()

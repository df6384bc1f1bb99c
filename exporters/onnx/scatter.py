"""Lowerings of writes into a copy: what functionalization makes of in-place operators, and ATen's own scatters."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.elementwise import select
from optc.exporters.onnx.reduce import places
from optc.exporters.onnx.walker import Lowering, Walker, argument

_aten = torch.ops.aten
_END = 2**63 - 1
_REDUCTIONS = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min", "mean": "add"}


def _val(node: Any) -> torch.Tensor:
    found: torch.Tensor = node.meta["val"]
    return found


def _copy(walker: Walker, node: Node) -> ir.Value:
    """copy(x, source): the source with the type and the shape of x."""
    x, source = node.args[:2]
    value = walker.value(source, _val(node).dtype)
    if str(_val(x).shape) == str(_val(source).shape):
        return value
    return walker.op("Expand", [value, walker.op("Shape", [walker.value(x)])])


def _between(walker: Walker, node: Node, axis: int, start: Any, end: Any, source: ir.Value) -> ir.Value:
    """x with the places start..end of an axis replaced by `source`."""
    x, place = walker.value(node.args[0]), walker.constant([axis])
    head = walker.op("Slice", [x, walker.constant([0]), walker.size(start), place])
    tail = walker.op("Slice", [x, walker.size(end), walker.constant([_END]), place])
    return walker.op("Concat", [head, source, tail], {"axis": axis})


def _slice_scatter(walker: Walker, node: Node) -> ir.Value:
    axis = int(argument(node, 2, "dim", 0)) % _val(node).dim()
    start, end, step = argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1)
    source = walker.value(node.args[1], _val(node).dtype)
    if step == 1:
        return _between(walker, node, axis, 0 if start is None else start, _END if end is None else end, source)
    size = int(_val(node).shape[axis])
    along = [1] * _val(node).dim()
    along[axis] = -1
    place = walker.constant(list(range(*slice(start, end, step).indices(size))))
    index = walker.op("Expand", [walker.op("Reshape", [place, walker.constant(along)]), walker.op("Shape", [source])])
    return walker.op("ScatterElements", [walker.value(node.args[0]), index, source], {"axis": axis})


def _select_scatter(walker: Walker, node: Node) -> ir.Value:
    axis, index = (int(item) for item in node.args[2:4])
    axis %= _val(node).dim()
    index = index % int(_val(node).shape[axis]) if index < 0 else index
    source = walker.op("Unsqueeze", [walker.value(node.args[1], _val(node).dtype), walker.constant([axis])])
    return _between(walker, node, axis, index, index + 1, source)


def known_steps(node: Node) -> str | None:
    """A predicate for slice_scatter."""
    start, end, step = argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1)
    sizes = (_val(node).shape[int(argument(node, 2, "dim", 0))], *(item for item in (start, end) if item is not None))
    known = step == 1 or all(isinstance(item, int) for item in sizes)
    return None if known else "a step over an axis of any size is not lowered"


def known_place(node: Node) -> str | None:
    """A predicate for select_scatter."""
    axis, index = node.args[2:4]
    if not isinstance(index, int):
        return "a computed place is not lowered"
    known = index >= 0 or isinstance(_val(node).shape[axis], int)
    return None if known else "a place from the end of an axis of any size is not lowered"


def _scatter(walker: Walker, node: Node) -> ir.Value:
    """scatter.src, scatter.value, scatter_add and scatter_reduce along one axis."""
    x, axis, index, source = node.args[:4]
    value = walker.value(index)
    if isinstance(source, Node):
        updates = walker.value(source, _val(node).dtype)
    else:
        updates = walker.op("Expand", [walker.constant(source, _val(node).dtype), walker.op("Shape", [value])])
    attributes: dict[str, Any] = {"axis": int(axis) % max(_val(node).dim(), 1)}
    data = walker.value(x, _val(node).dtype)
    if node.target is _aten.scatter_reduce.two:
        return _reduced(walker, node, data, value, updates, attributes)
    if node.target is _aten.scatter_add.default:
        attributes["reduction"] = "add"
    return walker.op("ScatterElements", [data, value, updates], attributes)


def _reduced(
    walker: Walker, node: Node, data: ir.Value, index: ir.Value, updates: ir.Value, attributes: dict[str, Any]
) -> ir.Value:
    """scatter_reduce. Without `include_self` the places that are hit begin at the reduction's neutral number; a mean
    counts its updates, and what stood there as one."""
    kind, dtype = str(node.args[4]), _val(node).dtype
    includes = bool(argument(node, 5, "include_self", True))
    shape = walker.op("Shape", [index])
    if not includes:
        neutral = walker.op("Expand", [walker.constant(_neutral(kind, dtype), dtype), shape])
        data = walker.op("ScatterElements", [data, index, neutral], attributes)
    reducing = {**attributes, "reduction": _REDUCTIONS[kind]}
    out = walker.op("ScatterElements", [data, index, updates], reducing)
    if kind != "mean":
        return out
    start = walker.op("Expand", [walker.constant(float(includes), dtype), walker.op("Shape", [data])])
    ones = walker.op("Expand", [walker.constant(1.0, dtype), shape])
    count = walker.op("ScatterElements", [start, index, ones], {**attributes, "reduction": "add"})
    return walker.op("Div", [out, walker.op("Max", [count, walker.constant(1.0, dtype)])])


def _neutral(kind: str, dtype: torch.dtype) -> float | int:
    """What a reduction of other numbers with it does not change."""
    if kind in ("amax", "amin"):
        if dtype.is_floating_point:
            return float("-inf") if kind == "amax" else float("inf")
        limits = torch.iinfo(dtype)
        return limits.min if kind == "amax" else limits.max
    return 1 if kind == "prod" else 0


def whole_source(node: Node) -> str | None:
    """A predicate for scatters: ONNX reads as many updates as there are indices."""
    index, source = node.args[2:4]
    if isinstance(source, Node) and str(_val(index).shape) != str(_val(source).shape):
        return "a source that is larger than its index is not lowered"
    if node.target is _aten.scatter_reduce.two:
        if node.args[4] not in _REDUCTIONS:
            return f"the reduction {node.args[4]!r} is not lowered"
        if node.args[4] == "mean" and not _val(node).dtype.is_floating_point:
            return "a mean of whole numbers is not lowered"
    return None


def _index_put(walker: Walker, node: Node) -> ir.Value:
    """x[..., i, j, ...] = values with index tensors on axes beside each other, or x[mask] = one value."""
    x, indices, values = node.args[:3]
    dtype, rank = _val(node).dtype, _val(node).dim()
    if _is_mask(indices):
        return _put_at_mask(walker, node)
    first = next(axis for axis, item in enumerate(indices) if item is not None)
    given = [item for item in indices[first:] if item is not None]
    data, place = walker.value(x), places(walker, given)
    order = [*range(first, first + len(given)), *range(first), *range(first + len(given), rank)]
    if first:
        data = walker.op("Transpose", [data], {"perm": order})
    head = walker.op("Shape", [place], {"end": -1})
    around = [walker.op("Shape", [data], {"start": len(given), "end": len(given) + first})] if first else []
    rest = [walker.op("Shape", [data], {"start": len(given) + first})] if rank > len(given) + first else []
    shape = walker.op("Concat", [*around, head, *rest], {"axis": 0})
    updates = walker.op("Expand", [walker.value(values, dtype), shape])
    if first:
        count = max(_val(item).dim() for item in given)
        behind = range(first + count, rank - len(given) + count)
        updates = walker.op("Transpose", [updates], {"perm": [*range(first, first + count), *range(first), *behind]})
    attributes = {"reduction": "add"} if argument(node, 3, "accumulate", False) else {}
    out = walker.op("ScatterND", [data, place, updates], attributes)
    return walker.op("Transpose", [out], {"perm": [order.index(axis) for axis in range(rank)]}) if first else out


def _put_at_mask(walker: Walker, node: Node) -> ir.Value:
    x, (mask,), values = node.args[:3]
    dtype, rank = _val(node).dtype, _val(node).dim()
    condition = walker.value(mask)
    if _val(mask).dim() < rank:
        condition = walker.op("Unsqueeze", [condition, walker.constant(list(range(_val(mask).dim(), rank)))])
    shape = walker.op("Shape", [walker.value(x)])
    fill = walker.op("Expand", [walker.op("Reshape", [walker.value(values, dtype), walker.constant([])]), shape])
    return select(walker, dtype, walker.op("Expand", [condition, shape]), fill, walker.value(x))


def _is_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0] is not None and _val(indices[0]).dtype is torch.bool


def known_places(node: Node) -> str | None:
    """A predicate for index_put."""
    indices, values = node.args[1:3]
    if _is_mask(indices):
        if argument(node, 3, "accumulate", False):
            return "adding at a mask is not lowered"
        return None if _val(values).numel() == 1 else "values of a number that depends on the data are not lowered"
    given = [axis for axis, item in enumerate(indices) if item is not None]
    if given != list(range(given[0], given[0] + len(given))):
        return "indices on both sides of a full slice are not lowered"
    indices = [item for item in indices if item is not None]
    if any(_val(item).dtype in (torch.bool, torch.uint8) for item in indices):
        return "a mask beside other indices is not lowered"
    return None


SCATTERS = (_aten.scatter.src, _aten.scatter.value, _aten.scatter_add.default, _aten.scatter_reduce.two)

TABLE: dict[Any, Lowering] = {
    **dict.fromkeys(SCATTERS, _scatter),
    _aten.copy.default: _copy,
    _aten.slice_scatter.default: _slice_scatter,
    _aten.select_scatter.default: _select_scatter,
    _aten.index_put.default: _index_put,
}

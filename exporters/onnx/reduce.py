"""Lowerings of reductions, softmax, indexing and ordering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import Lowering, Walker, argument

_aten = torch.ops.aten


def _axes(node: Node, given: Any) -> list[int] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    rank = source.meta["val"].dim()
    if given is None or given == []:
        return None
    return sorted(axis % rank for axis in ([given] if isinstance(given, int) else given))


def _reduce(kind: str) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        val = node.meta["val"]
        dtype = val.dtype if isinstance(val, torch.Tensor) else val[0].dtype
        axes = _axes(node, argument(node, 1, "dim"))
        keep = bool(argument(node, 2, "keepdim", False))
        inputs = [walker.value(node.args[0], dtype), None if axes is None else walker.constant(axes)]
        return walker.op(kind, inputs, {"keepdims": int(keep)})

    return lower


def _reduce_with_index(kind: str, largest: int) -> Lowering:
    """max.dim and min.dim: values and the index of one of them."""

    def lower(walker: Walker, node: Node) -> tuple[ir.Value, ir.Value]:
        (axis,) = _axes(node, node.args[1]) or [0]
        keep = int(bool(argument(node, 2, "keepdim", False)))
        x = walker.value(node.args[0])
        values = walker.op(kind, [x, walker.constant([axis])], {"keepdims": keep})
        indices = walker.op("ArgMax" if largest else "ArgMin", [x], {"axis": axis, "keepdims": keep})
        return values, indices

    return lower


def _variance(walker: Walker, node: Node) -> ir.Value:
    """var.correction: the mean square around the mean, times n / (n - correction)."""
    dtype, keep = node.meta["val"].dtype, int(bool(node.kwargs.get("keepdim", False)))
    axes = _axes(node, argument(node, 1, "dim"))
    sizes = list(node.args[0].meta["val"].shape)
    axes = list(range(len(sizes))) if axes is None else axes
    correction, x, along = node.kwargs.get("correction"), walker.value(node.args[0]), walker.constant(axes)
    correction = 1.0 if correction is None else float(correction)
    away = walker.op("Sub", [x, walker.op("ReduceMean", [x, along], {"keepdims": 1})])
    square = walker.op("ReduceMean", [walker.op("Mul", [away, away]), along], {"keepdims": keep})
    parts = [walker.op("Shape", [x], {"start": axis, "end": axis + 1}) for axis in axes]
    count = walker.op("ReduceProd", [walker.op("Concat", parts, {"axis": 0})], {"keepdims": 0})
    count = walker.cast(count, dtype)
    less = walker.op(
        "Max", [walker.op("Sub", [count, walker.constant(correction, dtype)]), walker.constant(0.0, dtype)]
    )
    return walker.op("Mul", [square, walker.op("Div", [count, less])])


def _any_all(kind: str) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        axes = _axes(node, argument(node, 1, "dim"))
        x = walker.cast(walker.value(node.args[0], torch.bool), torch.int32)
        inputs = [x, None if axes is None else walker.constant(axes)]
        out = walker.op(kind, inputs, {"keepdims": int(bool(argument(node, 2, "keepdim", False)))})
        return walker.cast(out, torch.bool)

    return lower


def _arg(kind: str) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        axes = _axes(node, argument(node, 1, "dim"))
        keep = int(bool(argument(node, 2, "keepdim", False)))
        x = walker.value(node.args[0])
        if axes is None:
            x, axes, keep = walker.op("Reshape", [x, walker.constant([-1])]), [0], 0
        return walker.op(kind, [x], {"axis": axes[0], "keepdims": keep})

    return lower


def _softmax(kind: str) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        x = walker.value(node.args[0], node.meta["val"].dtype)
        return walker.op(kind, [x], {"axis": int(argument(node, 1, "dim", -1))})

    return lower


def _cumsum(walker: Walker, node: Node) -> ir.Value:
    x = walker.value(node.args[0], node.meta["val"].dtype)
    return walker.op("CumSum", [x, walker.constant(int(node.args[1]))])


def _topk(walker: Walker, node: Node) -> tuple[ir.Value, ir.Value]:
    axis = int(argument(node, 2, "dim", -1))
    attributes = {"axis": axis, "largest": int(argument(node, 3, "largest", True)), "sorted": 1}
    return walker.op("TopK", [walker.value(node.args[0]), walker.size(node.args[1])], attributes, outputs=2)


def _sort(walker: Walker, node: Node) -> tuple[ir.Value, ir.Value]:
    axis, descending = int(argument(node, 1, "dim", -1)), bool(argument(node, 2, "descending", False))
    x = walker.value(node.args[0])
    rank = node.args[0].meta["val"].dim()
    count = walker.op("Shape", [x], {"start": axis % rank, "end": axis % rank + 1})
    return walker.op("TopK", [x, count], {"axis": axis, "largest": int(descending)}, outputs=2)


def _gather(walker: Walker, node: Node) -> ir.Value:
    x, axis, index = node.args[:3]
    rows = _whole_rows(x, int(axis), index)
    if rows is not None:
        return walker.op("GatherND", [walker.value(x), walker.value(rows)], {"batch_dims": 1})
    return walker.op("GatherElements", [walker.value(x), walker.value(index)], {"axis": int(axis)})


def _whole_rows(x: Node, axis: int, index: Node) -> Node | None:
    """[B,K,1] of an index [B,K,C] that takes whole rows of x [B,S,C]: one number of each, expanded."""
    rank = x.meta["val"].dim()
    if rank != 3 or axis % rank != 1 or index.target is not _aten.expand.default:
        return None
    rows = index.args[0]
    assert isinstance(rows, Node)
    (batch, _, width), shape, whole = (item.meta["val"].shape for item in (x, rows, index))
    alike = [str(size) for size in (batch, shape[1])] == [str(size) for size in whole[:2]]
    return rows if alike and str(shape[0]) == str(batch) and (shape[2], whole[2]) == (1, width) else None


def _index_select(walker: Walker, node: Node) -> ir.Value:
    x, axis, index = node.args[:3]
    return walker.op("Gather", [walker.value(x), walker.value(index)], {"axis": int(axis)})


def _one_hot(walker: Walker, node: Node) -> ir.Value:
    depth = walker.constant([int(node.args[1])])
    return walker.op("OneHot", [walker.value(node.args[0]), depth, walker.constant([0, 1])], {"axis": -1})


def known_depth(node: Node) -> str | None:
    """A predicate for one_hot."""
    return "the number of classes depends on the data" if argument(node, 1, "num_classes", -1) == -1 else None


def _index(walker: Walker, node: Node) -> ir.Value:
    """x[..., i, j, ...] with index tensors on axes beside each other, broadcast against each other."""
    x, indices = node.args[:2]
    first = next(axis for axis, item in enumerate(indices) if item is not None)
    given = [item for item in indices[first:] if item is not None]
    if len(given) == 1:
        return walker.op("Gather", [walker.value(x), walker.value(given[0])], {"axis": first})
    value, rank, behind = walker.value(x), x.meta["val"].dim(), len(given)
    if first:  # the indexed axes come to the front, and their result back
        order = [*range(first, first + behind), *range(first), *range(first + behind, rank)]
        value = walker.op("Transpose", [value], {"perm": order})
    out = walker.op("GatherND", [value, places(walker, given)])
    if not first:
        return out
    size, count = node.meta["val"].dim(), node.meta["val"].dim() - (rank - behind)
    back = [*range(count, count + first), *range(count), *range(count + first, size)]
    return walker.op("Transpose", [out], {"perm": back})


def places(walker: Walker, given: Sequence[Node]) -> ir.Value:
    """Index tensors, broadcast against each other, as [..., number of indices]."""
    parts = [walker.value(item, torch.int64) for item in given]
    last = walker.constant([-1])
    if len(parts) > 1:
        total = parts[0]
        for more in parts[1:]:
            total = walker.op("Add", [total, more])
        shape = walker.op("Shape", [total])
        parts = [walker.op("Expand", [part, shape]) for part in parts]
    parts = [walker.op("Unsqueeze", [part, last]) for part in parts]
    return parts[0] if len(parts) == 1 else walker.op("Concat", parts, {"axis": -1})


def adjacent_indices(node: Node) -> str | None:
    """A predicate for `index`: only integer tensors on axes beside each other are lowered."""
    given = [axis for axis, item in enumerate(node.args[1]) if item is not None]
    if given != list(range(given[0], given[0] + len(given))):
        return "indices on both sides of a full slice are not lowered"
    for item in node.args[1]:
        if item is not None and item.meta["val"].dtype in (torch.bool, torch.uint8):
            return "a boolean index has a data-dependent shape"
    return None


def _table() -> dict[Any, Lowering]:
    table: dict[Any, Lowering] = {}
    for lower, targets in (
        (_reduce("ReduceSum"), (_aten.sum.default, _aten.sum.dim_IntList)),
        (_reduce("ReduceMean"), (_aten.mean.default, _aten.mean.dim)),
        (_reduce("ReduceMax"), (_aten.amax.default, _aten.max.default)),
        (_reduce("ReduceMin"), (_aten.amin.default, _aten.min.default)),
        (_reduce("ReduceProd"), (_aten.prod.default, _aten.prod.dim_int)),
        (_reduce_with_index("ReduceMax", 1), (_aten.max.dim,)),
        (_reduce_with_index("ReduceMin", 0), (_aten.min.dim,)),
        (_variance, (_aten.var.correction,)),
        (_any_all("ReduceMax"), (_aten.any.default, _aten.any.dim, _aten.any.dims)),
        (_any_all("ReduceMin"), (_aten.all.default, _aten.all.dim)),
        (_arg("ArgMax"), (_aten.argmax.default,)),
        (_arg("ArgMin"), (_aten.argmin.default,)),
        (_softmax("Softmax"), (_aten.softmax.int, _aten._softmax.default)),
        (_softmax("LogSoftmax"), (_aten.log_softmax.int, _aten._log_softmax.default)),
        (_cumsum, (_aten.cumsum.default,)),
        (_topk, (_aten.topk.default,)),
        (_sort, (_aten.sort.default,)),
        (_gather, (_aten.gather.default,)),
        (_index_select, (_aten.index_select.default,)),
        (_one_hot, (_aten.one_hot.default,)),
        (_index, (_aten.index.Tensor,)),
    ):
        table.update(dict.fromkeys(targets, lower))
    return table


TABLE = _table()

"""Lowerings of pooling."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.layers import pair
from optc.exporters.onnx.walker import Lowering, Walker, argument

_aten = torch.ops.aten


def _rank(node: Node) -> int:
    """Spatial axes, by the operator's name."""
    return next(rank for rank in (1, 2, 3) if f"{rank}d" in node.target._schema.name)


def _value(node: Node) -> torch.Tensor:
    """The fake value of the (first) result."""
    val = node.meta["val"]
    found: torch.Tensor = val[0] if isinstance(val, list | tuple) else val
    return found


def _window(node: Node, padding: int) -> dict[str, Any]:
    """kernel_shape, strides and pads; `padding` is the place of that argument."""
    rank = _rank(node)
    kernel = pair(node.args[1], rank)
    return {
        "kernel_shape": kernel,
        "strides": pair(argument(node, 2, "stride", []) or kernel, rank),
        "pads": pair(argument(node, padding, "padding", 0), rank) * 2,
    }


def _average(walker: Walker, node: Node) -> ir.Value:
    attributes = _window(node, 3)
    attributes["ceil_mode"] = int(argument(node, 4, "ceil_mode", False))
    attributes["count_include_pad"] = int(argument(node, 5, "count_include_pad", True))
    return walker.op("AveragePool", [walker.value(node.args[0])], attributes)


def _maximum(walker: Walker, node: Node) -> Any:
    """max_pool and max_pool_with_indices, whose indices nothing reads."""
    attributes = _window(node, 3)
    attributes["dilations"] = pair(argument(node, 4, "dilation", 1), _rank(node))
    attributes["ceil_mode"] = int(argument(node, 5, "ceil_mode", False))
    out = walker.op("MaxPool", [walker.value(node.args[0])], attributes)
    return (out, None) if isinstance(node.meta["val"], list | tuple) else out


def _adaptive(kind: str) -> Lowering:
    """Windows of one size, which is what an adaptive pool has where its input is a whole multiple of its output."""

    def lower(walker: Walker, node: Node) -> Any:
        size = pair(node.args[1], _rank(node))
        x = walker.value(node.args[0])
        if all(item == 1 for item in size):
            out = walker.op(f"Global{kind}", [x])
        else:
            kernel = [a // b for a, b in zip(_spatial(node), size, strict=True)]
            out = walker.op(kind, [x], {"kernel_shape": kernel, "strides": kernel})
        return (out, None) if isinstance(node.meta["val"], list | tuple) else out

    return lower


def _spatial(node: Node) -> list[Any]:
    source: Any = node.args[0]
    return list(source.meta["val"].shape[-_rank(node) :])


# -- predicates -------------------------------------------------------------------------------


def batched(node: Node) -> str | None:
    """A predicate for pooling: ONNX needs the batch axis, and knows the places of maxima in another form."""
    if any(isinstance(user.args[1], int) and user.args[1] > 0 and user.users for user in _parts(node)):
        return "the places of maxima are not lowered"
    return None if _value(node).dim() == _rank(node) + 2 else "an input without batch axis is not lowered"


def _parts(node: Node) -> list[Node]:
    return list(node.users) if isinstance(node.meta["val"], list | tuple) else []


def plain_average(node: Node) -> str | None:
    """A predicate for avg_pool: ONNX has no other divisor than the size of the window."""
    return "divisor_override is not lowered" if argument(node, 6, "divisor_override") else batched(node)


def even_windows(node: Node) -> str | None:
    """A predicate for adaptive pools: one window size, that is an output of 1 or one that divides the input."""
    problem = batched(node)
    if problem:
        return problem
    size = pair(node.args[1], _rank(node))
    if all(item == 1 for item in size):
        return None
    even = all(isinstance(a, int) and a % b == 0 for a, b in zip(_spatial(node), size, strict=True))
    return None if even else f"windows of different sizes ({_spatial(node)} to {size}) are not lowered"


AVERAGES = (_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default)
MAXIMA = (
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.max_pool3d.default,
    _aten.max_pool2d_with_indices.default,
    _aten.max_pool3d_with_indices.default,
)
_ADAPTIVE_AVERAGES = (
    _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_avg_pool3d.default,
)
_ADAPTIVE_MAXIMA = (
    _aten.adaptive_max_pool1d.default,
    _aten.adaptive_max_pool2d.default,
    _aten.adaptive_max_pool3d.default,
)
ADAPTIVE = (*_ADAPTIVE_AVERAGES, *_ADAPTIVE_MAXIMA)

TABLE: dict[Any, Lowering] = {
    **dict.fromkeys(AVERAGES, _average),
    **dict.fromkeys(MAXIMA, _maximum),
    **dict.fromkeys(_ADAPTIVE_AVERAGES, _adaptive("AveragePool")),
    **dict.fromkeys(_ADAPTIVE_MAXIMA, _adaptive("MaxPool")),
}

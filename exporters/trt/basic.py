"""Lowerings of the `basic` op set: opset 17, for TensorRT 8.6 to 10.13, which have no layers for attention and caches.

Attention, norms and rotary embeddings are spelled out in MatMul, Softmax and arithmetic, in float32 where the dialect
computes so. A cache is written by ScatterND. No operator is newer than opset 17, no attribute than its operator there;
TensorRT 8 reads int64 as int32.
"""

from __future__ import annotations

import itertools
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import Lowering, Walker, argument, result_dtype

_aten, _optc = torch.ops.aten, torch.ops.optc
_MASKED = -30000.0  # exp of it is 0, and float16 holds it: TensorRT 8 may compute in either type


def _size(walker: Walker, value: ir.Value, axis: int) -> ir.Value:
    return walker.op("Shape", [value], {"start": axis, "end": axis + 1})


def _places(walker: Walker, count: ir.Value) -> ir.Value:
    """0, 1, ... count - 1 for a size [1], int64."""
    end = walker.op("Squeeze", [count, walker.constant([0])])
    return walker.op("Range", [walker.constant(0), end, walker.constant(1)])


def _axes_of(walker: Walker, value: ir.Value, *axes: int) -> ir.Value:
    return walker.op("Unsqueeze", [value, walker.constant(list(axes))])


def _tensor_scatter(walker: Walker, node: Node) -> ir.Value:
    """ScatterND at (b, h, past[b] + i): indices [B,Hkv,S,3]."""
    cache, new, past = node.args
    held, fresh = walker.value(cache), walker.value(new)
    heads = int(cache.meta["val"].shape[1])
    batch, tokens = _size(walker, fresh, 0), _size(walker, fresh, 2)
    shape = walker.op("Concat", [batch, walker.constant([heads]), tokens], {"axis": 0})
    place = walker.op("Add", [_axes_of(walker, walker.value(past, torch.int64), 1, 2), _places(walker, tokens)])
    parts = (
        _axes_of(walker, _places(walker, batch), 1, 2),
        walker.constant([[[head] for head in range(heads)]]),
        place,
    )
    columns = [_axes_of(walker, walker.op("Expand", [part, shape]), 3) for part in parts]
    return walker.op("ScatterND", [held, walker.op("Concat", columns, {"axis": 3}), fresh])


def masked_attention(walker: Walker, node: Node) -> ir.Value:
    """softmax(softcap(q k^T * scale) where keep) v; scores and softmax in float32.

    Query heads that share a key/value head are an axis of their own, [B,Hkv,G,S,D], so that keys and values are not
    repeated.
    """
    q, k, v, keep = node.args
    dtype = q.meta["val"].dtype
    heads, size = (int(q.meta["val"].shape[axis]) for axis in (1, 3))
    kv_heads, value_size = (int(v.meta["val"].shape[axis]) for axis in (1, 3))
    shape = walker.constant([0, kv_heads, heads // kv_heads, -1, size])
    query = walker.op("Reshape", [walker.value(q), shape])
    turned = walker.op("Transpose", [walker.value(k)], {"perm": [0, 1, 3, 2]})
    scores = walker.op("MatMul", [query, _axes_of(walker, turned, 2)])
    scores = scores if dtype is torch.float32 else walker.cast(scores, torch.float32)
    scores = walker.op("Mul", [scores, walker.constant(float(node.kwargs["scale"]), torch.float32)])
    if node.kwargs["softcap"]:
        cap = walker.constant(float(node.kwargs["softcap"]), torch.float32)
        scores = walker.op("Mul", [walker.op("Tanh", [walker.op("Div", [scores, cap])]), cap])
    lowest = walker.constant(_MASKED, torch.float32)
    scores = walker.op("Where", [_axes_of(walker, walker.value(keep), 2), scores, lowest])
    weights = walker.op("Softmax", [scores], {"axis": -1})
    weights = weights if dtype is torch.float32 else walker.cast(weights, dtype)
    out = walker.op("MatMul", [weights, _axes_of(walker, walker.value(v), 2)])
    return walker.op("Reshape", [out, walker.constant([0, heads, -1, value_size])])


def _rotary_cached(walker: Walker, node: Node) -> ir.Value:
    """x * cos + turned(x) * sin over the rotated features, with rows of the tables gathered by position."""
    x, position, cos, sin = node.args
    width, half = int(node.meta["val"].shape[3]), int(cos.meta["val"].shape[1])
    value, places = walker.value(x), walker.value(position)
    tables = [
        _axes_of(walker, walker.op("Gather", [walker.value(table), places], {"axis": 0}), 1) for table in (cos, sin)
    ]
    if node.kwargs["interleaved"]:
        return _rotated_pairs(walker, value, tables, half, width)
    bounds = [0, half, 2 * half, width]
    a, b, *rest = (_cut(walker, value, i, j) for i, j in itertools.pairwise(bounds) if j > i)
    return walker.op("Concat", [*_turned(walker, a, b, *tables), *rest], {"axis": 3})


def _cut(walker: Walker, value: ir.Value, start: int, end: int, step: int = 1) -> ir.Value:
    places = (walker.constant([item]) for item in (start, end, 3, step))
    return walker.op("Slice", [value, *places])


def _turned(walker: Walker, a: ir.Value, b: ir.Value, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ...]:
    """(a cos - b sin, b cos + a sin)"""

    def product(left: ir.Value, right: ir.Value) -> ir.Value:
        return walker.op("Mul", [left, right])

    first = walker.op("Sub", [product(a, cos), product(b, sin)])
    return first, walker.op("Add", [product(b, cos), product(a, sin)])


def _rotated_pairs(walker: Walker, value: ir.Value, tables: list[ir.Value], half: int, width: int) -> ir.Value:
    """Features (2i, 2i+1) as pairs."""
    a, b = (_cut(walker, value, start, 2 * half, 2) for start in (0, 1))
    pairs = [_axes_of(walker, part, 4) for part in _turned(walker, a, b, *tables)]
    out = walker.op("Concat", pairs, {"axis": 4})
    shape = walker.op(
        "Concat",
        [_size(walker, value, 0), _size(walker, value, 1), _size(walker, value, 2), walker.constant([2 * half])],
        {"axis": 0},
    )
    out = walker.op("Reshape", [out, shape])
    return out if 2 * half == width else walker.op("Concat", [out, _cut(walker, value, 2 * half, width)], {"axis": 3})


def _mean(walker: Walker, value: ir.Value, axes: list[int]) -> ir.Value:
    return walker.op("ReduceMean", [value], {"axes": axes, "keepdims": 1})


def _rms_norm(walker: Walker, node: Node) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) * weight, the quotient in float32."""
    weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    dtype = node.meta["val"].dtype
    x = walker.value(node.args[0], torch.float32)
    epsilon = walker.constant(torch.finfo(dtype).eps if eps is None else float(eps), torch.float32)
    square = _mean(walker, walker.op("Mul", [x, x]), list(range(-len(node.args[1]), 0)))
    root = walker.op("Sqrt", [walker.op("Add", [square, epsilon])])
    out = walker.op("Div", [x, root])
    if weight is not None:
        out = walker.op("Mul", [out, walker.value(weight, torch.float32)])
    return out if dtype is torch.float32 else walker.cast(out, dtype)


def _layer_norm(walker: Walker, node: Node) -> ir.Value:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32: TensorRT 8's own layer may overflow in float16."""
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    dtype, axes = node.meta["val"].dtype, list(range(-len(node.args[1]), 0))
    x = walker.value(node.args[0], torch.float32)
    x = walker.op("Sub", [x, _mean(walker, x, axes)])
    epsilon = walker.constant(float(argument(node, 4, "eps", 1e-5)), torch.float32)
    root = walker.op("Sqrt", [walker.op("Add", [_mean(walker, walker.op("Mul", [x, x]), axes), epsilon])])
    out = walker.op("Div", [x, root])
    for kind, item in (("Mul", weight), ("Add", bias)):
        out = out if item is None else walker.op(kind, [out, walker.value(item, torch.float32)])
    return out if dtype is torch.float32 else walker.cast(out, dtype)


def _gelu(walker: Walker, node: Node) -> ir.Value:
    """x * Phi(x), by erf, or by tanh where the model says so."""
    dtype = result_dtype(node)
    x = walker.value(node.args[0], torch.float32)

    def constant(value: float) -> ir.Value:
        return walker.constant(value, torch.float32)

    if node.kwargs.get("approximate", "none") == "tanh":
        cube = walker.op("Mul", [walker.op("Mul", [x, x]), x])
        inner = walker.op("Add", [x, walker.op("Mul", [cube, constant(0.044715)])])
        curve = walker.op("Tanh", [walker.op("Mul", [inner, constant((2 / torch.pi) ** 0.5)])])
    else:
        curve = walker.op("Erf", [walker.op("Mul", [x, constant(0.5**0.5)])])
    half = walker.op("Mul", [x, constant(0.5)])
    out = walker.op("Mul", [half, walker.op("Add", [curve, constant(1.0)])])
    return out if dtype is torch.float32 else walker.cast(out, dtype)


def _reduce(kind: str) -> Lowering:
    """Axes as an attribute: they became an input in opset 18."""

    def lower(walker: Walker, node: Node) -> ir.Value:
        given = argument(node, 1, "dim")
        rank = node.args[0].meta["val"].dim()
        attributes: dict[str, Any] = {"keepdims": int(bool(argument(node, 2, "keepdim", False)))}
        if given not in (None, []):
            attributes["axes"] = sorted(axis % rank for axis in ([given] if isinstance(given, int) else given))
        return walker.op(kind, [walker.value(node.args[0], result_dtype(node))], attributes)

    return lower


TABLE: dict[Any, Lowering] = {
    _optc.tensor_scatter.default: _tensor_scatter,
    _optc.masked_attention.default: masked_attention,
    _optc.rotary_cached.default: _rotary_cached,
    _aten.rms_norm.default: _rms_norm,
    _aten.layer_norm.default: _layer_norm,
    _aten.gelu.default: _gelu,
    _aten.mean.dim: _reduce("ReduceMean"),
    _aten.amax.default: _reduce("ReduceMax"),
    _aten.amin.default: _reduce("ReduceMin"),
}

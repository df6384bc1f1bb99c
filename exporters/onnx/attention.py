"""Lowerings of attention, spelled out in standard operators: masks, softcap and caches in any combination."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import Lowering, Walker

_optc = torch.ops.optc


def _heads_repeated(walker: Walker, value: ir.Value, node: Node, heads: int) -> ir.Value:
    """k or v [B,Hkv,T,D] with each head repeated for the queries of its group: [B,H,T,D]."""
    _, kv_heads, _, size = node.meta["val"].shape
    if kv_heads == heads:
        return value
    wide = walker.op("Unsqueeze", [value, walker.constant([2])])
    wide = walker.op("Expand", [wide, walker.constant([1, 1, heads // kv_heads, 1, 1])])
    return walker.op("Reshape", [wide, walker.constant([0, heads, -1, int(size)])])


def _places(walker: Walker, count: ir.Value) -> ir.Value:
    """0, 1, ... count - 1 for a size [1]. A fixed size stands in the graph, where `check_onnx` bounds it."""
    if count.const_value is not None:
        end = walker.constant(int(count.const_value.numpy()[0]))
    else:
        end = walker.op("Squeeze", [count, walker.constant([0])])
    return walker.op("Range", [walker.constant(0), end, walker.constant(1)])


def _size(walker: Walker, node: Node, axis: int) -> ir.Value:
    return walker.op("Shape", [walker.value(node)], {"start": axis, "end": axis + 1})


def _position_mask(walker: Walker, query: ir.Value, keys: ir.Value, *, causal: bool, window: int) -> ir.Value | None:
    """keep [...,S,T] for query positions [...,S]: key <= query, and key > query - window or both in one chunk of -window."""
    if not causal and not window:
        return None
    query, key = walker.op("Unsqueeze", [query, walker.constant([-1])]), _places(walker, keys)
    keep = walker.op("LessOrEqual", [key, query]) if causal else None
    if window:
        if window > 0:
            near = walker.op("Greater", [key, walker.op("Sub", [query, walker.constant(window)])])
        else:
            near = walker.op("Equal", [walker.op("Div", [item, walker.constant(-window)]) for item in (key, query)])
        keep = near if keep is None else walker.op("And", [keep, near])
    return keep


def _attend(
    walker: Walker,
    node: Node,
    q: Node,
    keys: tuple[ir.Value, Node],
    values: tuple[ir.Value, Node],
    keep: ir.Value | None,
    sinks: Node | None,
) -> ir.Value:
    """softmax(softcap(q k^T * scale) where keep) v; scores and softmax in float32. Sinks [H] are one more score of each
    query, whose weight is dropped."""
    dtype, heads = q.meta["val"].dtype, int(q.meta["val"].shape[1])
    turned = walker.op("Transpose", [_heads_repeated(walker, *keys, heads)], {"perm": [0, 1, 3, 2]})
    scores = walker.op("MatMul", [walker.value(q), turned])
    scores = scores if dtype is torch.float32 else walker.cast(scores, torch.float32)
    knobs: dict[str, Any] = dict(node.kwargs)
    scores = walker.op("Mul", [scores, walker.constant(float(knobs["scale"]), torch.float32)])
    if knobs["softcap"]:
        cap = walker.constant(float(knobs["softcap"]), torch.float32)
        scores = walker.op("Mul", [walker.op("Tanh", [walker.op("Div", [scores, cap])]), cap])
    if keep is not None:
        lowest = walker.constant(torch.finfo(torch.float32).min, torch.float32)
        scores = walker.op("Where", [keep, scores, lowest])
    if sinks is not None:
        sink = walker.op("Reshape", [walker.value(sinks, torch.float32), walker.constant([1, heads, 1, 1])])
        one = [_size(walker, q, 0), walker.constant([1]), _size(walker, q, 2), walker.constant([1])]
        column = walker.op("Expand", [sink, walker.op("Concat", one, {"axis": 0})])
        scores = walker.op("Concat", [scores, column], {"axis": -1})
    weights = walker.op("Softmax", [scores], {"axis": -1})
    if sinks is not None:
        ends = [walker.constant([0]), walker.constant([-1]), walker.constant([3])]
        weights = walker.op("Slice", [weights, *ends])
    weights = weights if dtype is torch.float32 else walker.cast(weights, dtype)
    return walker.op("MatMul", [weights, _heads_repeated(walker, *values, heads)])


def _attention(walker: Walker, node: Node) -> ir.Value:
    q, k, v, padding, sinks = node.args[:5]
    knobs: dict[str, Any] = dict(node.kwargs)
    queries, keys = _size(walker, q, 2), _size(walker, k, 2)
    keep = None
    if knobs["causal"] or knobs["window"]:
        query = walker.op("Add", [_places(walker, queries), walker.op("Sub", [keys, queries])])
        keep = _position_mask(walker, query, keys, causal=bool(knobs["causal"]), window=int(knobs["window"]))
    if padding is not None:
        real = walker.op("Unsqueeze", [walker.value(padding, torch.bool), walker.constant([1, 2])])
        keep = real if keep is None else walker.op("And", [keep, real])
    return _attend(walker, node, q, (walker.value(k), k), (walker.value(v), v), keep, sinks)


def _cached_attention(walker: Walker, node: Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Where GroupQueryAttention has no kernel: write into the cache, mask, attend.

    Only the used part of the cache, `total_length` tokens, is read.
    """
    q, k, v, k_cache, v_cache, past, total, sinks = node.args[:8]
    length, start = walker.size(total), walker.value(past)
    presents, used = [], []
    for cache, new in ((k_cache, k), (v_cache, v)):
        whole = walker.op("TensorScatter", [_grown(walker, cache, length), walker.value(new), start], {"axis": 2})
        presents.append(whole)
        part = walker.op("Slice", [whole, walker.constant([0]), length, walker.constant([2])])
        used.append((part, new))
    first = walker.op("Unsqueeze", [start, walker.constant([1])])
    query = walker.op("Add", [first, _places(walker, _size(walker, q, 2))])
    keep = _position_mask(walker, query, length, causal=True, window=int(node.kwargs["window"]))
    keep = walker.op("Unsqueeze", [keep, walker.constant([1])])
    return _attend(walker, node, q, used[0], used[1], keep, sinks), presents[0], presents[1]


def _grown(walker: Walker, cache: Node, length: ir.Value) -> ir.Value:
    """cache [B,Hkv,P,D] with zeros behind it, max(P, length) tokens long."""
    _, heads, _, width = cache.meta["val"].shape
    tokens = _size(walker, cache, 2)
    room = walker.op("Sub", [walker.op("Max", [tokens, length]), tokens])
    shape = [_size(walker, cache, 0), walker.constant([int(heads)]), room, walker.constant([int(width)])]
    zero = walker.constant(0.0, cache.meta["val"].dtype)
    room = walker.op("Expand", [zero, walker.op("Concat", shape, {"axis": 0})])
    return walker.op("Concat", [walker.value(cache), room], {"axis": 2})


TABLE: dict[Any, Lowering] = {
    _optc.attention.default: _attention,
    _optc.cached_attention.default: _cached_attention,
}

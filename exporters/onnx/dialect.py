"""Lowerings of the `optc::` dialect."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import MICROSOFT, Lowering, Walker

_optc = torch.ops.optc


def _heads_repeated(walker: Walker, node: Node, heads: int) -> ir.Value:
    """k or v [B,Hkv,T,D] with each head repeated for the queries of its group: [B,H,T,D]."""
    value, (_, kv_heads, _, size) = walker.value(node), node.meta["val"].shape
    if kv_heads == heads:
        return value
    groups = heads // kv_heads
    wide = walker.op("Unsqueeze", [value, walker.constant([2])])
    wide = walker.op("Expand", [wide, walker.constant([1, 1, groups, 1, 1])])
    return walker.op("Reshape", [wide, walker.constant([0, heads, -1, int(size)])])


def _position_mask(walker: Walker, q: Node, k: Node, *, causal: bool, window: int) -> ir.Value | None:
    """keep [S,T]: key <= query and key > query - window, query i standing at key T - S + i."""
    if not causal and window <= 0:
        return None
    sizes = [walker.op("Shape", [walker.value(x)], {"start": 2, "end": 3}) for x in (q, k)]
    queries, keys = (walker.op("Squeeze", [size, walker.constant([0])]) for size in sizes)
    zero, one = walker.constant(0), walker.constant(1)
    offset = walker.op("Sub", [keys, queries])
    query = walker.op("Unsqueeze", [walker.op("Add", [walker.op("Range", [zero, queries, one]), offset]), walker.constant([1])])
    key = walker.op("Range", [zero, keys, one])
    keep = walker.op("LessOrEqual", [key, query]) if causal else None
    if window > 0:
        near = walker.op("Greater", [key, walker.op("Sub", [query, walker.constant(window)])])
        keep = near if keep is None else walker.op("And", [keep, near])
    return keep


def _attention(walker: Walker, node: Node) -> ir.Value:
    """softmax(q k^T * scale where keep) v, spelled out: masks and softcap in any combination."""
    q, k, v, padding = node.args[:4]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    dtype, heads = node.meta["val"].dtype, int(q.meta["val"].shape[1])
    keys = walker.op("Transpose", [_heads_repeated(walker, k, heads)], {"perm": [0, 1, 3, 2]})
    scores = walker.op("MatMul", [walker.value(q), keys])
    scores = scores if dtype is torch.float32 else walker.cast(scores, torch.float32)
    scores = walker.op("Mul", [scores, walker.constant(float(node.kwargs["scale"]), torch.float32)])
    if node.kwargs["softcap"]:
        cap = walker.constant(float(node.kwargs["softcap"]), torch.float32)
        scores = walker.op("Mul", [walker.op("Tanh", [walker.op("Div", [scores, cap])]), cap])
    keep = _position_mask(walker, q, k, causal=bool(node.kwargs["causal"]), window=int(node.kwargs["window"]))
    if padding is not None:
        real = walker.op("Unsqueeze", [walker.value(padding, torch.bool), walker.constant([1, 2])])
        keep = real if keep is None else walker.op("And", [keep, real])
    if keep is not None:
        lowest = walker.constant(torch.finfo(torch.float32).min, torch.float32)
        scores = walker.op("Where", [keep, scores, lowest])
    weights = walker.op("Softmax", [scores], {"axis": -1})
    weights = weights if dtype is torch.float32 else walker.cast(weights, dtype)
    return walker.op("MatMul", [weights, _heads_repeated(walker, v, heads)])


def no_sinks(node: Node) -> str | None:
    """A predicate for attention: sinks are not lowered."""
    return "attention sinks are not lowered" if node.args[4] is not None else None


def _rotary(walker: Walker, node: Node) -> ir.Value:
    """RotaryEmbedding-23 on cos and sin of the positions at hand."""
    x, position, frequencies = node.args[:3]
    dtype, size = node.meta["val"].dtype, int(node.meta["val"].shape[3])
    places = walker.op("Unsqueeze", [walker.value(position, torch.float32), walker.constant([-1])])
    angle = walker.op("Mul", [places, walker.value(frequencies, torch.float32)])
    scale = walker.constant(float(node.kwargs["scaling"]), torch.float32)
    tables = [walker.op("Mul", [walker.op(kind, [angle]), scale]) for kind in ("Cos", "Sin")]
    tables = [table if dtype is torch.float32 else walker.cast(table, dtype) for table in tables]
    half = int(frequencies.meta["val"].shape[0])
    attributes: dict[str, Any] = {"interleaved": int(bool(node.kwargs["interleaved"]))}
    if 2 * half != size:
        attributes["rotary_embedding_dim"] = 2 * half
    return walker.op("RotaryEmbedding", [walker.value(x), *tables], attributes)


def _group_query_attention(walker: Walker, node: Node) -> tuple[ir.Value, ...]:
    query, key, value, past_key, past_value, seqlens, total, cos, sin = node.args
    streams = [None if x is None else walker.value(x) for x in (query, key, value)]
    tables = [None if x is None else walker.value(x) for x in (cos, sin)]
    knobs = dict(node.kwargs)
    attributes = {
        "num_heads": knobs["num_heads"],
        "kv_num_heads": knobs["kv_num_heads"],
        "scale": float(knobs["scale"]),
        "softcap": float(knobs["softcap"]),
        "local_window_size": knobs["local_window_size"],
        "do_rotary": int(cos is not None),
        "rotary_interleaved": int(bool(knobs["rotary_interleaved"])),
    }
    inputs = [*streams, walker.value(past_key), walker.value(past_value), walker.value(seqlens), walker.value(total, torch.int32), *tables]
    return walker.op("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3)


def _matmul_nbits(walker: Walker, node: Node) -> ir.Value:
    x, packed, scales, zeros, bias = node.args
    inputs = [walker.value(x), walker.value(packed), walker.value(scales),
              None if zeros is None else walker.value(zeros), None, None if bias is None else walker.value(bias)]  # fmt: skip
    return walker.op("MatMulNBits", inputs, dict(node.kwargs), domain=MICROSOFT)


def _skip_rms_norm(walker: Walker, node: Node) -> tuple[ir.Value, ir.Value]:
    inputs = [walker.value(item) for item in node.args]
    attributes = {"epsilon": float(node.kwargs["eps"])}
    made = walker.op("SkipSimplifiedLayerNormalization", inputs, attributes, domain=MICROSOFT, outputs=4)
    for unused in made[1:3]:
        unused.name = ""
    return made[0], made[3]


TABLE: dict[Any, Lowering] = {
    _optc.attention.default: _attention,
    _optc.rotary.default: _rotary,
    _optc.group_query_attention.default: _group_query_attention,
    _optc.matmul_nbits.default: _matmul_nbits,
    _optc.skip_rms_norm.default: _skip_rms_norm,
}

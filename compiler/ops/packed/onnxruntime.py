"""Packed operators: made by legalization only, one per kernel of a destination.

`group_query_attention`, `matmul_nbits`, `gather_nbits` and `skip_rms_norm` mirror ONNX Runtime's contrib operators
(com.microsoft: GroupQueryAttention, MatMulNBits, GatherBlockQuantized, SkipSimplifiedLayerNormalization); the references
here follow https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, so that a
legalized Program still runs and is gated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from optc.compiler.ops.attention_arguments import Cached, Knobs
from optc.compiler.ops.library import PackedProduct, define
from optc.compiler.ops.packed.rounded_inputs import round_activations

ROUNDS = 4
"""The accuracy level at which MatMulNBits rounds its input to int8."""


def rotate_cached(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first 2*R features of x [B,H,S,D] by rows `position` [B,S] of cos and sin [positions,R]."""
    cos, sin = (table[position][:, None].to(x.dtype) for table in (cos, sin))
    size = 2 * cos.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([out, rest], -1)


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


GROUP_QUERY = (
    "Tensor query, Tensor? key, Tensor? value, Tensor past_key, Tensor past_value, Tensor seqlens_k, "
    "SymInt total_sequence_length, Tensor? cos_cache, Tensor? sin_cache"
)
GROUP_QUERY_KNOBS = (
    "int num_heads, int kv_num_heads, float scale, int local_window_size, float softcap, bool rotary_interleaved"
)


class GroupQuery(NamedTuple):
    """Positional arguments of GroupQueryAttention, whatever its caches hold.

    query [B,S,H*D] with key, value [B,S,Hkv*D], or packed [B,S,(H+2*Hkv)*D] with neither. seqlens_k int32 [B] is the
    total length of each row minus one; in a right-padded first prompt it may be less than S - 1.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    past_key: Tensor
    past_value: Tensor
    seqlens_k: Tensor
    total_sequence_length: int
    cos_cache: Tensor | None
    sin_cache: Tensor | None


class GroupQueryKnobs(TypedDict):
    """Keyword arguments of GroupQueryAttention; a `local_window_size` below 1 is none."""

    num_heads: int
    kv_num_heads: int
    scale: float
    local_window_size: int
    softcap: float
    rotary_interleaved: bool


def takes_group_query(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(call, *rest, **knobs)` as an op is called: with the fields of `GroupQuery` one by one."""
    count = len(GroupQuery._fields)

    def call(*args: Any, **knobs: Any) -> Any:
        return function(GroupQuery(*args[:count]), *args[count:], **knobs)

    return call


def as_cached(call: GroupQuery, knobs: GroupQueryKnobs) -> tuple[Cached, Knobs]:
    """The same attention in the dialect's terms: heads apart, rotated, with the lengths of the past."""
    query, key, value = call.query, call.key, call.value
    heads, kv_heads = knobs["num_heads"], knobs["kv_num_heads"]
    if key is None or value is None:
        size = query.shape[-1] // (heads + 2 * kv_heads)
        query, key, value = query.split([heads * size, kv_heads * size, kv_heads * size], -1)
    q, k, v = _heads(query, heads), _heads(key, kv_heads), _heads(value, kv_heads)
    past = (call.seqlens_k.long() + 1 - q.shape[2]).clamp(min=0)
    if call.cos_cache is not None and call.sin_cache is not None:
        position = past[:, None] + torch.arange(q.shape[2], device=q.device)
        tables = (call.cos_cache, call.sin_cache)
        q, k = (rotate_cached(x, position, *tables, interleaved=knobs["rotary_interleaved"]) for x in (q, k))
    window = max(knobs["local_window_size"], 0)
    cached = Cached(q, k, v, call.past_key, call.past_value, past, call.total_sequence_length)
    return cached, {"scale": knobs["scale"], "window": window, "softcap": knobs["softcap"]}


def _group_query_attention(call: GroupQuery, **knobs: Unpack[GroupQueryKnobs]) -> tuple[Tensor, Tensor, Tensor]:
    """The output [B,S,H*D] and the caches [B,Hkv,max(P, total_sequence_length),D]."""
    cached, plain = as_cached(call, knobs)
    out, keys, values = torch.ops.optc.cached_attention(*cached, None, **plain)
    return out.transpose(1, 2).flatten(2), keys, values


def group_query_fake(call: GroupQuery, *_: object, num_heads: int, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    """[B,S,H*Dv], and the grown caches."""
    length = torch.sym_max(call.past_key.shape[2], call.total_sequence_length)
    keys, values = (
        cache.new_empty((*cache.shape[:2], length, cache.shape[3])) for cache in (call.past_key, call.past_value)
    )
    return call.query.new_empty((*call.query.shape[:2], num_heads * values.shape[3])), keys, values


_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By how many codes a byte holds: the type as wide as their bytes."""


def pack_nbits(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., n] -> uint8 [..., n*bits/8], the first code in the lowest bits (bits 2, 4, 8).

    The last byte is filled up with zeros where n*bits is not a multiple of 8. The bytes that one is made of are read as one
    wide number, as `unpack_nbits` writes them.
    """
    each = 8 // bits
    missing = -codes.shape[-1] % each
    whole = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    flat = whole.reshape(-1)  # an axis of one element may have any stride
    wide = (flat.clone() if flat.storage_offset() % each else flat.contiguous()).view(_WIDE[each])
    packed = wide.clone()
    for place in range(1, each):
        packed |= wide >> ((8 - bits) * place)
    return packed.to(torch.uint8).view(*codes.shape[:-1], whole.shape[-1] // each)


def unpack_nbits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_nbits`; `count` codes along the last axis.

    All codes of a byte are moved into the bytes of one wide number, the first into the lowest, and read as bytes: on
    a machine whose numbers begin with their lowest byte.
    """
    each = 8 // bits
    wide = packed.to(_WIDE[each])
    spread = wide.clone()
    for place in range(1, each):
        spread |= wide << ((8 - bits) * place)
    spread &= sum((2**bits - 1) << (8 * place) for place in range(each))
    return spread.view(torch.uint8)[..., :count].contiguous()


def _matmul_nbits(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, **knobs: int
) -> Tensor:
    """x [..., K], packed uint8 [N, K/block, block*bits/8], scales [N, K/block], zero_points uint8 [N, ...].

    `accuracy_level` 4 rounds x to int8 in blocks of the weight's size; any other takes x as it is.
    """
    weight = _unpacked(packed, scales, zero_points, **knobs)
    return torch.nn.functional.linear(_multiplied(x, **knobs), weight, bias)


def _unpacked(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, *, K: int, bits: int, block_size: int, **_: int
) -> Tensor:
    """The weight [N, K], or those of its rows that are given, in the type of its scales."""
    codes = unpack_nbits(packed, bits, block_size).reshape(-1, K)
    zero = None if zero_points is None else unpack_nbits(zero_points, bits, K // block_size)
    made: Tensor = torch.ops.optc.dequantize(codes, scales, zero, bits=bits, group_size=block_size)
    return made


def _multiplied(x: Tensor, *, block_size: int, accuracy_level: int, **_: int) -> Tensor:
    """What is multiplied by the weight."""
    return round_activations(x, block_size).to(x.dtype) if accuracy_level == ROUNDS else x


def _gather_nbits(
    indices: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, *, K: int, bits: int, block_size: int
) -> Tensor:
    """Rows [..., K] of the weight that `matmul_nbits` takes in the same form: packed uint8 [N, K/block, block*bits/8]."""
    blocks, rows = K // block_size, indices.flatten()
    codes = unpack_nbits(packed[rows], bits, block_size).reshape(-1, K)
    zero = None if zero_points is None else unpack_nbits(zero_points[rows], bits, blocks)
    values = torch.ops.optc.dequantize(codes, scales[rows], zero, bits=bits, group_size=block_size)
    return values.reshape(*indices.shape, K)


def _skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + skip; (rms_norm(s) * weight, s)."""
    total = x + skip
    return torch.nn.functional.rms_norm(total, [total.shape[-1]], weight, eps), total


define(
    f"group_query_attention({GROUP_QUERY}, *, {GROUP_QUERY_KNOBS}) -> (Tensor, Tensor, Tensor)",
    takes_group_query(_group_query_attention),
    takes_group_query(group_query_fake),
    attends="BSC",
)
define(
    "matmul_nbits(Tensor x, Tensor packed, Tensor scales, Tensor? zero_points, Tensor? bias, *, int K, int N, "
    "int bits, int block_size, int accuracy_level) -> Tensor",
    _matmul_nbits,
    lambda x, *_, N, **__: x.new_empty((*x.shape[:-1], N)),
    rounds_inside=lambda keywords: keywords["accuracy_level"] == ROUNDS,
    product=PackedProduct(parts=(1, 2, 3), weight=_unpacked, multiplied=_multiplied, bias=4, apart=("accuracy_level",)),
)
define(
    "gather_nbits(Tensor indices, Tensor packed, Tensor scales, Tensor? zero_points, *, int K, int bits, "
    "int block_size) -> Tensor",
    _gather_nbits,
    lambda indices, _, scales, *__, K, **___: scales.new_empty((*indices.shape, K)),
)
define(
    "skip_rms_norm(Tensor x, Tensor skip, Tensor weight, *, float eps) -> (Tensor, Tensor)",
    _skip_rms_norm,
    lambda x, skip, *_, **__: (torch.empty_like(x), torch.empty_like(x)),
)

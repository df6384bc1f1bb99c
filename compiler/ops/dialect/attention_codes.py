"""Cached attention over 8-bit keys and values: caches hold codes, scales are calibrated.

`cached_attention_codes` is `cached_attention` with codes in place of keys and values. The packed
`group_query_attention_codes` mirrors com.microsoft.GroupQueryAttention with `kv_cache_bit_width` 8, which takes
new keys and values as they are, rotates and rounds them, and attends to what its cache then holds. Shapes as in
`optc.compiler.ops.dialect.attention`; scales broadcast to [B,Hkv,T,D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.dialect.attention import attend_cache, write_cache_
from optc.compiler.ops.library import define
from optc.compiler.ops.packed.onnxruntime import rotate_cached


def _grown(cache: Tensor, new: Tensor, past_lengths: Tensor, length: int) -> Tensor:
    """cache [B,Hkv,P,D] with codes of zero behind it, `length` tokens long, and `new` written into it."""
    shape = (*cache.shape[:2], length - cache.shape[2], cache.shape[3])
    # float8 has no concatenation: bytes have.
    room = torch.zeros(shape, dtype=torch.uint8, device=cache.device)
    whole = torch.cat([cache.view(torch.uint8), room], 2)
    write_cache_(whole, new.contiguous().view(torch.uint8), past_lengths)
    return whole.view(cache.dtype)


def _cached_attention_codes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_lengths: Tensor,
    total_length: int,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,S,D] float; k, v [B,Hkv,S,D] and caches [B,Hkv,P,D] codes -> output, caches with the new codes."""
    length = max(k_cache.shape[2], total_length)
    keys, values = (_grown(cache, new, past_lengths, length) for cache, new in ((k_cache, k), (v_cache, v)))
    seen_keys, seen_values = (
        (codes[:, :, :total_length].float() * factor).to(q.dtype)
        for codes, factor in ((keys, k_scale), (values, v_scale))
    )
    out = attend_cache(
        q, seen_keys, seen_values, past_lengths, None, scale=scale, window=window, softcap=softcap
    )
    return out, keys, values


def _cached_attention_codes_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, past_lengths: Tensor, total_length: int,
    *_: object, **__: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    length = torch.sym_max(k_cache.shape[2], total_length)
    grown = [cache.new_empty((*cache.shape[:2], length, cache.shape[3])) for cache in (k_cache, v_cache)]
    return q.new_empty((*q.shape[:3], v.shape[3])), grown[0], grown[1]


def _group_query_attention_codes(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_sequence_length: int,
    cos_cache: Tensor | None,
    sin_cache: Tensor | None,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int,
    softcap: float,
    rotary_interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_query_attention` over int8 caches; k_scale, v_scale [1], or [Hkv*D] for one per channel."""
    if key is None or value is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = query.split([num_heads * size, kv_num_heads * size, kv_num_heads * size], -1)
    q, k, v = (
        x.unflatten(-1, (count, -1)).transpose(1, 2)
        for x, count in ((query, num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    past = (seqlens_k.long() + 1 - q.shape[2]).clamp(min=0)
    if cos_cache is not None and sin_cache is not None:
        position = past[:, None] + torch.arange(q.shape[2], device=q.device)
        q, k = (
            rotate_cached(x, position, cos_cache, sin_cache, interleaved=rotary_interleaved) for x in (q, k)
        )
    k_factor, v_factor = (x if x.numel() == 1 else x.reshape(kv_num_heads, 1, -1) for x in (k_scale, v_scale))
    k_codes = torch.ops.optc.quantize(k, k_factor, format="int8")
    v_codes = torch.ops.optc.quantize(v, v_factor, format="int8")
    out, keys, values = _cached_attention_codes(
        q, k_codes, v_codes, past_key, past_value, past, total_sequence_length, k_factor, v_factor,
        scale=scale, window=max(local_window_size, 0), softcap=softcap,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2), keys, values


def _group_query_attention_codes_fake(
    query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
    seqlens_k: Tensor, total_sequence_length: int, *_: object, num_heads: int, **__: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    length = torch.sym_max(past_key.shape[2], total_sequence_length)
    grown = [cache.new_empty((*cache.shape[:2], length, cache.shape[3])) for cache in (past_key, past_value)]
    return query.new_empty((*query.shape[:2], num_heads * past_value.shape[3])), grown[0], grown[1]


define(
    "cached_attention_codes(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor past_lengths, "
    "SymInt total_length, Tensor k_scale, Tensor v_scale, *, float scale, int window, float softcap) "
    "-> (Tensor, Tensor, Tensor)",
    _cached_attention_codes,
    _cached_attention_codes_fake,
)
define(
    "group_query_attention_codes(Tensor query, Tensor? key, Tensor? value, Tensor past_key, Tensor past_value, "
    "Tensor seqlens_k, SymInt total_sequence_length, Tensor? cos_cache, Tensor? sin_cache, Tensor k_scale, "
    "Tensor v_scale, *, int num_heads, int kv_num_heads, float scale, int local_window_size, float softcap, "
    "bool rotary_interleaved) -> (Tensor, Tensor, Tensor)",
    _group_query_attention_codes,
    _group_query_attention_codes_fake,
)

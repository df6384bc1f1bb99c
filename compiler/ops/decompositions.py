"""The dialect in plain ATen: traceable, without loops over rows, for targets without kernels of their own.

Each function takes what its op takes and computes the same numbers up to rounding. Shapes as in
`optc.compiler.ops.attention_arguments`, and G = H / Hkv.

Query heads of one key/value head are laid behind each other as rows of one query [B, Hkv, G*S, D], so
that keys and values are read once and never repeated in memory.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from optc.compiler.ops.attention_arguments import Cached, Knobs, position_mask, takes_cached


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    sinks: Tensor | None,
    *,
    causal: bool,
    **knobs: Unpack[Knobs],
) -> Tensor:
    """`optc::attention`: q [B,H,S,D], k/v [B,Hkv,T,D], key_padding [B,T] -> [B,H,S,Dv]."""
    keep = None
    if causal or knobs["window"]:
        query = torch.arange(q.shape[2], device=q.device) + (k.shape[2] - q.shape[2])
        key = torch.arange(k.shape[2], device=q.device)
        keep = position_mask(query, key, causal=causal, window=knobs["window"])[None, None]
    if key_padding is not None:
        seen = key_padding[:, None, None, :].bool()
        keep = seen if keep is None else keep & seen
    return attend(q, k, v, keep, sinks, scale=knobs["scale"], softcap=knobs["softcap"])


@takes_cached
def cached_attention_(call: Cached, sinks: Tensor | None, **knobs: Unpack[Knobs]) -> Tensor:
    """`optc::cached_attention_`: writes k, v into the caches, reads their first `total_length` slots only."""
    write_cache_(call.k_cache, call.k, call.past_lengths)
    write_cache_(call.v_cache, call.v, call.past_lengths)
    keys, values = (cache[:, :, : call.total_length] for cache in (call.k_cache, call.v_cache))
    query = call.past_lengths[:, None] + torch.arange(call.q.shape[2], device=call.q.device)
    key = torch.arange(call.total_length, device=call.q.device)
    keep = position_mask(query, key, causal=True, window=knobs["window"])[:, None]
    return attend(call.q, keys, values, keep, sinks, scale=knobs["scale"], softcap=knobs["softcap"])


def write_cache_(cache: Tensor, new: Tensor, past_lengths: Tensor) -> None:
    """cache[b, :, past_lengths[b] + i] = new[b, :, i], without the tokens beyond the capacity.

    Those (right padding that reaches past the buffer) are turned into a second write of the row's first
    token to its own place, as a masked scatter would have to read the cache.
    """
    device = cache.device
    offset = torch.arange(new.shape[2], device=device)
    fits = past_lengths[:, None] + offset < cache.shape[2]
    source = torch.where(fits, offset, 0)[:, None, :]
    row = torch.arange(new.shape[0], device=device)[:, None, None]
    head = torch.arange(new.shape[1], device=device)[None, :, None]
    place = past_lengths[:, None, None] + source
    tokens = torch.ops.aten.index.Tensor(new, [row, head, source])
    cache.index_put_((row, head, place), tokens.to(cache.dtype))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention of q [B,H,S,D] over k/v [B,Hkv,T,D] where `keep` [B or 1, 1, S or 1, T] says so.

    As in the reference, a query with nothing to attend to gives the average of the values.
    """
    batch, heads, size, width = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    # A clone, not `contiguous`: torch 2.11 takes a concatenation for contiguous, and lays it out otherwise later.
    rows = q.clone(memory_format=torch.contiguous_format).view(batch, kv_heads, groups * size, width)
    if softcap or sinks is not None:
        out = _softmax_attention(rows, k, v, keep, sinks, groups, scale=scale, softcap=softcap)
    else:
        bias = None if keep is None else _bias(keep, size, groups, q.dtype)
        out = torch.nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=scale)
    return out.contiguous().view(batch, heads, size, v.shape[3])


def _bias(keep: Tensor, size: int, groups: int, dtype: torch.dtype) -> Tensor:
    """0 where `keep` [b,1,S,T], the lowest number elsewhere, repeated for G groups: [b,1,G*S,T].

    Not minus infinity: a row without a key would become NaN.
    """
    wide = keep[:, :, None].expand(-1, -1, groups, size, -1).reshape(keep.shape[0], 1, groups * size, keep.shape[3])
    return torch.zeros_like(wide, dtype=dtype).masked_fill(~wide, torch.finfo(dtype).min)


def _softmax_attention(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sinks: Tensor | None,
    groups: int,
    *,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention with the scores spelled out: rows [B,Hkv,G*S,D] -> [B,Hkv,G*S,Dv]."""
    batch, kv_heads, count, _ = rows.shape
    size = count // groups
    scores = torch.matmul(rows, k.transpose(-1, -2)).float() * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(batch, kv_heads, groups, size, k.shape[2])
    if keep is not None:
        scores = scores.masked_fill(~keep[:, :, None], torch.finfo(torch.float32).min)
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        sink = sinks.float().view(1, kv_heads, groups, 1, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink)
        weights = torch.exp(scores - top)
        weights = weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - top))
    return torch.matmul(weights.to(v.dtype).view(batch, kv_heads, count, k.shape[2]), v)

"""Stateless attention and attention over a linear KV cache.

Shapes: B batch, H query heads, Hkv key/value heads (H % Hkv == 0), S new tokens, T keys, D head
size. `window` counts tokens including the query itself (0: none); `softcap` 0 is none. Scores and
softmax are computed in float32, as transformers' eager attention does.

Grouped-query attention: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245. Softcap: Gemma 2
report, https://arxiv.org/abs/2408.00118. Sinks: a learned logit per head that joins the softmax
and is then dropped (gpt-oss).
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.library import define

_KNOBS = "*, float scale, {causal}int window, float softcap"


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
) -> Tensor:
    """softmax(softcap(q k^T * scale) where keep) v; q [B,H,S,D], k/v [B,Hkv,T,D], keep broadcast to [B,H,S,T].

    A query with nothing to attend to gives finite values (a uniform average), as transformers does.
    """
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, 1) if groups > 1 else k
    v = v.repeat_interleave(groups, 1) if groups > 1 else v
    scores_BHST = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if softcap:
        scores_BHST = torch.tanh(scores_BHST / softcap) * softcap
    if keep is not None:
        scores_BHST = scores_BHST.masked_fill(~keep, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        scores_BHST = torch.softmax(torch.cat([scores_BHST, column], -1), -1)[..., :-1]
    else:
        scores_BHST = torch.softmax(scores_BHST, -1)
    return torch.matmul(scores_BHST.to(v.dtype), v)


def position_mask(query: Tensor, key: Tensor, *, causal: bool, window: int) -> Tensor:
    """keep[..., i, j] for query positions [..., S] and key positions [T]."""
    query, key = query[..., :, None], key[None, :]
    keep = key <= query if causal else torch.ones_like(key <= query)
    return keep & (key > query - window) if window > 0 else keep


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    query, key = (
        torch.arange(queries, device=q.device) + (keys - queries),
        torch.arange(keys, device=q.device),
    )
    keep = position_mask(query, key, causal=causal, window=window)[None, None]
    if key_padding is not None:
        keep = keep & key_padding[:, None, None, :].bool()
    return masked_attention(q, k, v, keep, sinks, scale=scale, softcap=softcap)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def attend_cache(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past_lengths: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Causal attention of S new tokens at positions past_lengths[b] + i over keys [B,Hkv,T,D]."""
    query = past_lengths[:, None] + torch.arange(q.shape[2], device=q.device)
    keep = position_mask(query, torch.arange(keys.shape[2], device=q.device), causal=True, window=window)
    return masked_attention(q, keys, values, keep[:, None], sinks, scale=scale, softcap=softcap)


def write_cache_(cache: Tensor, new: Tensor, past_lengths: Tensor) -> None:
    """cache[b, :, past_lengths[b] + i] = new[b, :, i]; tokens beyond the capacity are dropped.

    Only a right-padded row can have such tokens: its padding may reach past the buffer.
    """
    for row in range(new.shape[0]):
        start = int(past_lengths[row])
        room = min(new.shape[2], cache.shape[2] - start)
        cache[row, :, start : start + room] = new[row, :, :room].to(cache.dtype)


def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_lengths: Tensor,
    total_length: int,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    length = max(k_cache.shape[2], total_length)
    grown = []
    for cache, new in ((k_cache, k), (v_cache, v)):
        room = cache.new_zeros((*cache.shape[:2], length - cache.shape[2], cache.shape[3]))
        whole = torch.cat([cache, room], 2)
        write_cache_(whole, new, past_lengths)
        grown.append(whole)
    keys, values = (cache[:, :, :total_length] for cache in grown)
    out = attend_cache(q, keys, values, past_lengths, sinks, scale=scale, window=window, softcap=softcap)
    return out, grown[0], grown[1]


def _cached_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, past_lengths: Tensor, total_length: int,
    *_: object, **__: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    length = torch.sym_max(k_cache.shape[2], total_length)
    grown = [cache.new_empty((*cache.shape[:2], length, cache.shape[3])) for cache in (k_cache, v_cache)]
    return _attention_fake(q, k, v), grown[0], grown[1]


def _cached_attention_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_lengths: Tensor,
    total_length: int,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    write_cache_(k_cache, k, past_lengths)
    write_cache_(v_cache, v, past_lengths)
    keys, values = k_cache[:, :, :total_length], v_cache[:, :, :total_length]
    return attend_cache(q, keys, values, past_lengths, sinks, scale=scale, window=window, softcap=softcap)


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? sinks, "
    + _KNOBS.format(causal="bool causal, ")
    + ") -> Tensor",
    _attention,
    _attention_fake,
)
define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor past_lengths, "
    "SymInt total_length, Tensor? sinks, " + _KNOBS.format(causal="") + ") -> (Tensor, Tensor, Tensor)",
    _cached_attention,
    _cached_attention_fake,
)
define(
    "cached_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor past_lengths, SymInt total_length, Tensor? sinks, " + _KNOBS.format(causal="") + ") -> Tensor",
    _cached_attention_in_place,
    _attention_fake,
)

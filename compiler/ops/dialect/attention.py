"""Stateless attention and attention over a linear KV cache; arguments as `optc.compiler.ops.attention_arguments` says.

Scores and softmax are computed in float32, as transformers' eager attention does.

Grouped-query attention: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245. Softcap: Gemma 2
report, https://arxiv.org/abs/2408.00118. Sinks: a learned logit per head that joins the softmax
and is then dropped (gpt-oss).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from optc.compiler.ops import decompositions
from optc.compiler.ops.attention_arguments import (
    CAUSAL_KNOBS,
    KNOBS,
    Cached,
    Knobs,
    cached_schema,
    grown_caches,
    position_mask,
    takes_cached,
)
from optc.compiler.ops.library import define


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


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    sinks: Tensor | None,
    *,
    causal: bool,
    **knobs: Unpack[Knobs],
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    query = torch.arange(queries, device=q.device) + (keys - queries)
    key = torch.arange(keys, device=q.device)
    keep = position_mask(query, key, causal=causal, window=knobs["window"])[None, None]
    if key_padding is not None:
        keep = keep & key_padding[:, None, None, :].bool()
    return masked_attention(q, k, v, keep, sinks, scale=knobs["scale"], softcap=knobs["softcap"])


def attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """[B,H,S,Dv]"""
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def attend_cache(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past_lengths: Tensor,
    sinks: Tensor | None,
    **knobs: Unpack[Knobs],
) -> Tensor:
    """Causal attention of S new tokens at positions past_lengths[b] + i over keys [B,Hkv,T,D]."""
    query = past_lengths[:, None] + torch.arange(q.shape[2], device=q.device)
    key = torch.arange(keys.shape[2], device=q.device)
    keep = position_mask(query, key, causal=True, window=knobs["window"])[:, None]
    return masked_attention(q, keys, values, keep, sinks, scale=knobs["scale"], softcap=knobs["softcap"])


def write_cache_(cache: Tensor, new: Tensor, past_lengths: Tensor) -> None:
    """cache[b, :, past_lengths[b] + i] = new[b, :, i]; tokens beyond the capacity are dropped.

    Only a right-padded row can have such tokens: its padding may reach past the buffer.
    """
    for row in range(new.shape[0]):
        start = int(past_lengths[row])
        room = min(new.shape[2], cache.shape[2] - start)
        cache[row, :, start : start + room] = new[row, :, :room].to(cache.dtype)


def _cached_attention(call: Cached, sinks: Tensor | None, **knobs: Unpack[Knobs]) -> tuple[Tensor, Tensor, Tensor]:
    length = max(call.k_cache.shape[2], call.total_length)
    grown = []
    for cache, new in ((call.k_cache, call.k), (call.v_cache, call.v)):
        room = cache.new_zeros((*cache.shape[:2], length - cache.shape[2], cache.shape[3]))
        whole = torch.cat([cache, room], 2)
        write_cache_(whole, new, call.past_lengths)
        grown.append(whole)
    keys, values = (cache[:, :, : call.total_length] for cache in grown)
    return attend_cache(call.q, keys, values, call.past_lengths, sinks, **knobs), grown[0], grown[1]


def cached_attention_fake(call: Cached, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    """[B,H,S,Dv], and the grown caches."""
    return attention_fake(call.q, call.k, call.v), *grown_caches(call)


def _cached_attention_in_place(call: Cached, sinks: Tensor | None, **knobs: Unpack[Knobs]) -> Tensor:
    write_cache_(call.k_cache, call.k, call.past_lengths)
    write_cache_(call.v_cache, call.v, call.past_lengths)
    keys, values = (cache[:, :, : call.total_length] for cache in (call.k_cache, call.v_cache))
    return attend_cache(call.q, keys, values, call.past_lengths, sinks, **knobs)


define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? sinks, *, {KNOBS}) -> Tensor",
    _attention,
    attention_fake,
    aten=decompositions.attention,
    attends="BHSD",
)
define(
    f"cached_attention({cached_schema(in_place=False)}, Tensor? sinks, *, {CAUSAL_KNOBS}) -> (Tensor, Tensor, Tensor)",
    takes_cached(_cached_attention),
    takes_cached(cached_attention_fake),
    attends="BHSD",
)
define(
    f"cached_attention_({cached_schema(in_place=True)}, Tensor? sinks, *, {CAUSAL_KNOBS}) -> Tensor",
    takes_cached(_cached_attention_in_place),
    attention_fake,
    aten=decompositions.cached_attention_,
    attends="BHSD",
)

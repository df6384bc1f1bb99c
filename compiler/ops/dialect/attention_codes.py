"""Cached attention over 8-bit keys and values: caches hold codes, scales are calibrated.

`cached_attention_codes` is `cached_attention` with codes in place of keys and values; scales broadcast to [B,Hkv,T,D].
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from optc.compiler.ops.attention_arguments import CAUSAL_KNOBS, Cached, Knobs, cached_schema, takes_cached
from optc.compiler.ops.dialect.attention import attend_cache, cached_attention_fake, write_cache_
from optc.compiler.ops.library import define


def _grown(cache: Tensor, new: Tensor, past_lengths: Tensor, length: int) -> Tensor:
    """cache [B,Hkv,P,D] with codes of zero behind it, `length` tokens long, and `new` written into it."""
    shape = (*cache.shape[:2], length - cache.shape[2], cache.shape[3])
    # float8 has no concatenation: bytes have.
    room = torch.zeros(shape, dtype=torch.uint8, device=cache.device)
    whole = torch.cat([cache.view(torch.uint8), room], 2)
    write_cache_(whole, new.contiguous().view(torch.uint8), past_lengths)
    return whole.view(cache.dtype)


def attend_codes(
    call: Cached, k_scale: Tensor, v_scale: Tensor, **knobs: Unpack[Knobs]
) -> tuple[Tensor, Tensor, Tensor]:
    """q float, keys, values and caches as codes -> output, caches with the new codes."""
    length = max(call.k_cache.shape[2], call.total_length)
    keys, values = (
        _grown(cache, new, call.past_lengths, length) for cache, new in ((call.k_cache, call.k), (call.v_cache, call.v))
    )
    seen_keys, seen_values = (
        (codes[:, :, : call.total_length].float() * factor).to(call.q.dtype)
        for codes, factor in ((keys, k_scale), (values, v_scale))
    )
    return attend_cache(call.q, seen_keys, seen_values, call.past_lengths, None, **knobs), keys, values


define(
    f"cached_attention_codes({cached_schema(in_place=False)}, Tensor k_scale, Tensor v_scale, *, {CAUSAL_KNOBS}) "
    "-> (Tensor, Tensor, Tensor)",
    takes_cached(attend_codes),
    takes_cached(cached_attention_fake),
    attends="BHSD",
)

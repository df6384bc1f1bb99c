"""The arguments of the attention ops, once: schemas, references, fakes and traceable forms all read them from here.

Shapes: B batch, H query heads, Hkv key/value heads (H % Hkv == 0), S new tokens, T keys, P tokens of a cache, D head
size, Dv that of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

CAUSAL_KNOBS = "float scale, int window, float softcap"
"""Keyword arguments of attention over a cache, which is always causal: see `Knobs`."""
KNOBS = "float scale, bool causal, int window, float softcap"
"""Keyword arguments of stateless attention."""


class Knobs(TypedDict):
    """How scores become weights.

    `scale` multiplies q k^T; `window` counts the keys that a query sees, itself included (0: all; -C: those of its own
    chunk, of positions cut into C each, as in Llama 4); `softcap` c makes scores s to c * tanh(s / c) (0: none).
    """

    scale: float
    window: int
    softcap: float


class Cached(NamedTuple):
    """Positional arguments that all attention over a linear cache begins with.

    q [B,H,S,D]; k [B,Hkv,S,D] and v [B,Hkv,S,Dv] of the new tokens; caches [B,Hkv,P,D] and [B,Hkv,P,Dv];
    past_lengths [B] is where each row's new tokens go, and total_length how many slots are read.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    past_lengths: Tensor
    total_length: int


def cached_schema(*, in_place: bool) -> str:
    """`Cached` in a schema; caches that are written in place say so."""
    first, second = ("(a!)", "(b!)") if in_place else ("", "")
    return (
        f"Tensor q, Tensor k, Tensor v, Tensor{first} k_cache, Tensor{second} v_cache, Tensor past_lengths, "
        "SymInt total_length"
    )


def takes_cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(call, *rest, **knobs)` as an op is called: with the fields of `Cached` one by one."""
    count = len(Cached._fields)

    def call(*args: Any, **knobs: Any) -> Any:
        return function(Cached(*args[:count]), *args[count:], **knobs)

    return call


def grown_caches(call: Cached, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    """What caches that are returned look like: as long as they were, or as is read."""
    length = torch.sym_max(call.k_cache.shape[2], call.total_length)
    first, second = (
        cache.new_empty((*cache.shape[:2], length, cache.shape[3])) for cache in (call.k_cache, call.v_cache)
    )
    return first, second


def position_mask(query: Tensor, key: Tensor, *, causal: bool, window: int) -> Tensor:
    """keep[..., i, j] for query positions [..., S] and key positions [T]."""
    query, key = query[..., :, None], key[None, :]
    keep = key <= query if causal else torch.ones_like(key <= query)
    return keep & is_near(query, key, window) if window else keep


def is_near(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Whether a key lies in the window, or the chunk, of a query; of positions that broadcast. `window` is not 0."""
    return key > query - window if window > 0 else key // -window == query // -window


CHUNKS_REFUSED = "attention in chunks is not lowered"
"""What targets say whose kernels know windows alone."""

"""Attention over a paged KV pool (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).

N tokens of R requests are laid end to end; `cu_seqlens[r]` is where request r starts. Pools are
[num_blocks, block_size, Hkv, D] in any strides, one per layer for K and one for V: a stacked pool of
dynamic block count is miscompiled by AOTInductor (pytorch issue 198068).

A token whose slot is `PADDING` fills up a batch of fixed size, as CUDA graphs need them: nothing is
written for it and its row of the result is zeros. A request of such tokens alone may have any context
length and block table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from optc.compiler.ops.attention_arguments import CAUSAL_KNOBS, Knobs
from optc.compiler.ops.dialect.attention import attend_cache
from optc.compiler.ops.dialect.rotary import rotate
from optc.compiler.ops.library import define

PADDING = -1
"""The slot of a token that is none."""

TABLES = "Tensor slot_mapping, Tensor block_tables, Tensor context_lens, Tensor cu_seqlens"


def _write_pool_(pool: Tensor, slot_mapping: Tensor, new: Tensor) -> None:
    """pool[slot // block_size, slot % block_size] = new[token], but for padding."""
    real = slot_mapping != PADDING
    slots = slot_mapping[real]
    pool[slots // pool.shape[1], slots % pool.shape[1]] = new[real].to(pool.dtype)


def attend_requests(
    attend: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """Write new keys and values into the pools, and answer each request's new tokens; 0 for padding.

    Args:
        attend: (queries [1,H,S,D], keys and values [1,Hkv,T,D] of past and new tokens, where the new ones are) -> [1,H,S,Dv].
    """
    for pool, new in ((k_pool, k), (v_pool, v)):
        _write_pool_(pool, slot_mapping, new)
    out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=v.dtype, device=q.device)
    for request in range(block_tables.shape[0]):
        fresh = slice(int(cu_seqlens[request]), int(cu_seqlens[request + 1]))
        if bool((slot_mapping[fresh] == PADDING).all()):
            continue
        length, blocks = int(context_lens[request]), block_tables[request].long()
        keys, values = (pool[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for pool in (k_pool, v_pool))
        out[fresh] = attend(q[fresh].transpose(0, 1)[None], keys, values, fresh)[0].transpose(0, 1)
    out[slot_mapping == PADDING] = 0
    return out


def _paged_attention(*args: Tensor, **knobs: Unpack[Knobs]) -> Tensor:
    def attend(query: Tensor, keys: Tensor, values: Tensor, _: slice) -> Tensor:
        past = torch.full((1,), keys.shape[2] - query.shape[2], device=query.device)
        return attend_cache(query, keys, values, past, None, **knobs)

    return attend_requests(attend, *args)


def _rotary_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    position: Tensor,
    inv_freq: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    scaling: float,
    interleaved: bool,
    eps: float,
    **knobs: Unpack[Knobs],
) -> Tensor:
    """`paged_attention_` of q [N,H,D] and k [N,Hkv,D] after `rms_norm` over D and `rotary`.

    Args:
        position: int64 [N], of each token.
        inv_freq: float32 [R / 2]: the first R features are rotated, as `rotary` does; the rest pass.
        q_norm, k_norm: weights [D] of the norms of each head, of any floating type; None for no norm. `eps` is of both.
    """

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = torch.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
        rows = rotate(x.transpose(0, 1)[None], position[None], inv_freq, scaling=scaling, interleaved=interleaved)
        return rows[0].transpose(0, 1).contiguous()

    rows = (turned(q, q_norm), turned(k, k_norm), v)
    return _paged_attention(*rows, k_pool, v_pool, slot_mapping, block_tables, context_lens, cu_seqlens, **knobs)


def paged_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """[N,H,Dv]"""
    return v.new_empty((q.shape[0], q.shape[1], v.shape[2]))


POOLS = "Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool"

define(
    f"paged_attention_({POOLS}, {TABLES}, *, {CAUSAL_KNOBS}) -> Tensor",
    _paged_attention,
    paged_attention_fake,
    attends="NHD",
)
define(
    f"rotary_paged_attention_({POOLS}, {TABLES}, Tensor position, Tensor inv_freq, Tensor? q_norm, Tensor? k_norm, *, "
    f"float scaling, bool interleaved, float eps, {CAUSAL_KNOBS}) -> Tensor",
    _rotary_paged_attention,
    paged_attention_fake,
    attends="NHD",
)

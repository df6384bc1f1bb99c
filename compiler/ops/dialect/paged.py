"""Attention over a paged KV pool (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).

N tokens of R requests are laid end to end; `cu_seqlens[r]` is where request r starts. Pools are
[num_blocks, block_size, Hkv, D], one per layer for K and one for V: a stacked pool of dynamic
block count is miscompiled by AOTInductor (pytorch issue 198068).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from optc.compiler.ops.attention_arguments import CAUSAL_KNOBS, Knobs
from optc.compiler.ops.dialect.attention import attend_cache
from optc.compiler.ops.library import define


def _paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    **knobs: Unpack[Knobs],
) -> Tensor:
    for pool, new in ((k_pool, k), (v_pool, v)):
        pool.view(-1, *pool.shape[2:]).index_copy_(0, slot_mapping, new.to(pool.dtype))
    out = torch.empty((*q.shape[:2], v.shape[2]), dtype=v.dtype, device=q.device)
    for request in range(block_tables.shape[0]):
        start, end = int(cu_seqlens[request]), int(cu_seqlens[request + 1])
        length = int(context_lens[request])
        blocks = block_tables[request].long()
        keys, values = (pool[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for pool in (k_pool, v_pool))
        past = torch.full((1,), length - (end - start), device=q.device)
        query = q[start:end].transpose(0, 1)[None]
        rows = attend_cache(query, keys, values, past, None, **knobs)
        out[start:end] = rows[0].transpose(0, 1)
    return out


def _paged_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return v.new_empty((q.shape[0], q.shape[1], v.shape[2]))


define(
    "paged_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, "
    "Tensor slot_mapping, Tensor block_tables, Tensor context_lens, Tensor cu_seqlens, "
    f"*, {CAUSAL_KNOBS}) -> Tensor",
    _paged_attention,
    _paged_attention_fake,
    attends="NHD",
)

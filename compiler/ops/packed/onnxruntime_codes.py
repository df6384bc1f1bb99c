"""ONNX Runtime's attention over caches of 8-bit codes.

`group_query_attention_codes` mirrors com.microsoft.GroupQueryAttention with `kv_cache_bit_width` 8, which takes new
keys and values as they are, rotates and rounds them, and attends to what its cache then holds. Made by legalization
only.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from optc.compiler.ops.dialect.attention_codes import attend_codes
from optc.compiler.ops.library import define
from optc.compiler.ops.packed.onnxruntime import (
    GROUP_QUERY,
    GROUP_QUERY_KNOBS,
    GroupQuery,
    GroupQueryKnobs,
    as_cached,
    group_query_fake,
    takes_group_query,
)


def _group_query_attention_codes(
    call: GroupQuery, k_scale: Tensor, v_scale: Tensor, **knobs: Unpack[GroupQueryKnobs]
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_query_attention` over int8 caches; k_scale, v_scale [1], or [Hkv*D] for one per channel."""
    cached, plain = as_cached(call, knobs)
    factors = [x if x.numel() == 1 else x.reshape(knobs["kv_num_heads"], 1, -1) for x in (k_scale, v_scale)]
    k, v = (
        torch.ops.optc.quantize(x, factor, format="int8")
        for x, factor in zip((cached.k, cached.v), factors, strict=True)
    )
    out, keys, values = attend_codes(cached._replace(k=k, v=v), *factors, **plain)
    return out.transpose(1, 2).flatten(2), keys, values


define(
    f"group_query_attention_codes({GROUP_QUERY}, Tensor k_scale, Tensor v_scale, *, {GROUP_QUERY_KNOBS}) "
    "-> (Tensor, Tensor, Tensor)",
    takes_group_query(_group_query_attention_codes),
    takes_group_query(group_query_fake),
    attends="BSC",
)

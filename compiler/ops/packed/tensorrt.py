"""Operators over KV caches of fixed capacity, one per operator of ONNX opset 24 that TensorRT has a layer for.

`tensor_scatter` mirrors TensorScatter-24 (linear, axis -2), `masked_attention` Attention-24 with an explicit boolean
mask, `rotary_cached` RotaryEmbedding-23 with tables; see https://onnx.ai/onnx/operators/. Made by legalization only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.dialect.attention import attention_fake, masked_attention, write_cache_
from optc.compiler.ops.library import define
from optc.compiler.ops.packed.onnxruntime import rotate_cached


def _tensor_scatter(cache: Tensor, new: Tensor, past_lengths: Tensor) -> Tensor:
    """A copy of cache [B,Hkv,T,D] with new [B,Hkv,S,D] at places past_lengths[b] + i, which are below T."""
    out = cache.clone(memory_format=torch.contiguous_format)
    write_cache_(out, new, past_lengths)
    return out


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, scale: float, softcap: float) -> Tensor:
    """q [B,H,S,D] over k, v [B,Hkv,T,D] where keep [B,1,S,T] says so; softmax in float32."""
    return masked_attention(q, k, v, keep, None, scale=scale, softcap=softcap)


def _rotary_cached(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first 2*R features of x [B,H,S,D] by rows `position` [B,S] of cos and sin [positions,R]."""
    return rotate_cached(x, position, cos, sin, interleaved=interleaved)


define(
    "tensor_scatter(Tensor cache, Tensor new, Tensor past_lengths) -> Tensor",
    _tensor_scatter,
    lambda cache, *_: torch.empty_like(cache, memory_format=torch.contiguous_format),
)
define(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor keep, *, float scale, float softcap) -> Tensor",
    _masked_attention,
    attention_fake,
    attends="BHSD",
)
define(
    "rotary_cached(Tensor x, Tensor position, Tensor cos, Tensor sin, *, bool interleaved) -> Tensor",
    _rotary_cached,
    lambda x, *_, **__: torch.empty_like(x, memory_format=torch.contiguous_format),
)

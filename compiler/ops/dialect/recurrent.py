"""Layers that carry a state of fixed size from token to token: linear attention, and short causal convolutions.

Linear attention keeps a matrix S [K, V] per head instead of keys and values:

    S[t] = exp(decay[t]) * S[t-1] + key[t] (x) update[t]          out[t] = S[t]^T query[t]

with update[t] = value[t], or by the delta rule beta[t] * (value[t] - (exp(decay[t]) * S[t-1])^T key[t]). What models call
otherwise is this with other letters: Mamba 2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060: query C, key B, value dt x,
decay dt A), Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752: a head of one value per channel, decay per key), gated
linear attention (Yang et al. 2023, https://arxiv.org/abs/2312.06635), the gated delta rule (Yang et al. 2024,
https://arxiv.org/abs/2412.06464), Kimi delta attention (https://arxiv.org/abs/2510.26692: decay per key).

Axes: query, key [B,S,H,K], value [B,S,H,V], decay [B,S,H] or [B,S,H,K] (natural logarithms, at most 0), beta [B,S,H], state
[B,H,K,V]. Sums are in float32, and so is the state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.library import define


def _cached_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    held, out = state.float(), []
    wide = decay[..., None] if decay.dim() == 3 else decay
    for token in range(query.shape[1]):
        q, k, v = (item[:, token].float() for item in (query, key, value))
        held = held * wide[:, token].float().exp()[..., None]
        if beta is not None:
            v = (v - (held * k[..., None]).sum(-2)) * beta[:, token].float()[..., None]
        held = held + k[..., None] * v[..., None, :]
        out.append((held * q[..., None]).sum(-2))
    return torch.stack(out, 1).to(value.dtype), held.to(state.dtype).clone()


def _cached_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """[B,S,H,V], and the new state [B,H,K,V]."""
    return torch.empty_like(value, memory_format=torch.contiguous_format), torch.empty_like(
        rest[-1], memory_format=torch.contiguous_format
    )


def first_state(key: Tensor, value: Tensor) -> Tensor:
    """What a sequence begins with: zeros [B,H,K,V]."""
    return value.new_zeros((key.shape[0], key.shape[2], key.shape[3], value.shape[3]), dtype=torch.float32)


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None) -> Tensor:
    return _cached_linear_attention(query, key, value, decay, beta, first_state(key, value))[0]


def _by_cached(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None) -> Tensor:
    """The same from a state of zeros, for engines that have `cached_linear_attention`."""
    out: Tensor = torch.ops.optc.cached_linear_attention(query, key, value, decay, beta, first_state(key, value))[0]
    return out


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """[B,S,H,V]"""
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`optc::causal_conv1d`: every channel of x [B,C,S] with its own weight [C,K], over the K tokens up to each."""
    history = torch.nn.functional.pad(x, (weight.shape[1] - 1, 0))
    return torch.nn.functional.conv1d(history, weight[:, None], bias, groups=weight.shape[0])


define(
    "linear_attention(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor? beta) -> Tensor",
    _linear_attention,
    _fake,
    aten=_by_cached,
    keeps_state=True,
)
define(
    "cached_linear_attention(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor? beta, Tensor state) "
    "-> (Tensor, Tensor)",
    _cached_linear_attention,
    _cached_fake,
)
define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    causal_conv1d,
    lambda x, weight, bias: torch.empty_like(x, memory_format=torch.contiguous_format),
    aten=causal_conv1d,
    keeps_state=True,
)

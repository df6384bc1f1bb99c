"""`linear_attention` and `causal_conv1d` against transformers' own functions of recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from optc.compiler.capture import recurrent

B, S, H, K, V = 2, 13, 4, 6, 5


def _f(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_delta_rule_with_decay_per_head_and_per_key() -> None:
    given = (_f(B, S, H // 2, K), (_f(B, S, H // 2, K) + 1) / 4, _f(B, S, H, V))  # longer keys let the state explode
    beta = torch.rand(B, S, H)
    for norm in (True, False):
        rest = (-torch.rand(B, S, H), beta)
        expected = qwen.torch_recurrent_gated_delta_rule(*given, *rest, use_qk_l2norm_in_kernel=norm)[0]
        _close(recurrent._delta_rule(*given, *rest, use_qk_l2norm_in_kernel=norm)[0], expected)
    given = (_f(B, S, H, K), _f(B, S, H, K) + 1, _f(B, S, H, V), -torch.rand(B, S, H, K), beta)
    expected = kimi.chunk_kimi_delta_attention(*given, chunk_size=4, use_qk_l2norm_in_kernel=True)[0]
    _close(recurrent._delta_rule(*given, use_qk_l2norm_in_kernel=True)[0], expected)


def test_state_space_dual() -> None:
    given = (_f(B, S, H, V), _f(B, S, H), -torch.rand(H), _f(B, S, 2, K), _f(B, S, 2, K) + 1)
    named = {"D": _f(H), "dt_bias": _f(H) + 1, "dt_softplus": True, "dt_limit": (0.1, 1.0)}
    _close(recurrent._state_space_dual(*given, 4, **named), mamba2.mamba2_chunk_scan(*given, 4, **named))


def test_selective_scan() -> None:
    given = (_f(B, H, S), _f(B, H, S), -torch.rand(H, K), _f(B, K, S), _f(B, K, S) + 1)
    named = {"D": _f(H), "z": _f(B, H, S) - 1, "delta_bias": _f(H) + 1, "delta_softplus": True}
    _close(recurrent._selective_scan(*given, **named), mamba.mamba_selective_scan(*given, **named))


def test_convolution() -> None:
    given = (_f(B, H, S), _f(H, 3), _f(H))
    _close(recurrent._conv(*given, activation="silu"), mamba.causal_conv1d_fn(*given, activation="silu"))


def test_a_sequence_in_two_pieces_is_the_whole() -> None:
    keys = torch.nn.functional.normalize(_f(B, S, H, K) + 1, dim=-1)  # without unit length the state would explode
    given = (_f(B, S, H, K), keys, _f(B, S, H, V), -torch.rand(B, S, H), torch.rand(B, S, H))
    whole = torch.ops.optc.linear_attention(*given)
    state = torch.zeros(B, H, K, V)
    found = []
    for part in (slice(0, 7), slice(7, S)):
        out, state = torch.ops.optc.cached_linear_attention(*(item[:, part] for item in given), state)
        found.append(out)
    _close(torch.cat(found, 1), whole)

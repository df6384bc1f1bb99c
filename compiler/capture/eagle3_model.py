"""The draft model of EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840): one decoder layer over a base's states.

At position i it reads the token behind it, t[i + 1], and a hidden state g[i] of width H, and says what t[i + 2] is:

    e = input_layernorm(embedding(t[i + 1]));  h = hidden_norm(g[i]);  r = h or g[i]
    a = r + o_proj(attention(q, k, v of [e, h]));  s[i] = a + mlp(post_attention_layernorm(a));  logits = lm_head(norm(s[i]))

g[i] is `fc` of three hidden states of the base at position i where the base has computed them, and s[i - 1] where it has
not: the draft's own state takes their place from its second token on. The logits are over a draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from optc.compiler.model_folder.eagle3 import EMBEDDING, Eagle3Config


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attending(NamedTuple):
    """What a layer attends with: queries [B, heads, S, D], keys and values [B, groups, S, D], turned by their positions."""

    query: Tensor
    key: Tensor
    value: Tensor


class _Attention(nn.Module):
    """The projections of an attention whose queries, keys and values are made of two states side by side."""

    inv_freq: Tensor

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.width = config.head_dim
        size, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(2 * size, heads * self.width, bias=False)
        self.k_proj = nn.Linear(2 * size, groups * self.width, bias=False)
        self.v_proj = nn.Linear(2 * size, groups * self.width, bias=False)
        self.o_proj = nn.Linear(heads * self.width, size, bias=False)
        steps = torch.arange(0, self.width, 2, dtype=torch.float32) / self.width
        self.register_buffer("inv_freq", 1.0 / config.rope_theta**steps, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Attending:
        query, key, value = (
            part(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return Attending(query * cos + _turned(query) * sin, key * cos + _turned(key) * sin, value)


def _turned(x: Tensor) -> Tensor:
    """Rotary embedding by halves (Su et al. 2021, https://arxiv.org/abs/2104.09864), as Llama has it."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class _Mlp(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = _Mlp(size, config.intermediate_size)


class Eagle3(nn.Module):
    """See above. Names of parameters are those of the folder; the embedding [V, H] stands beside them.

    Training attends in its own way; it calls `before` and `behind`.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(len(config.boundaries) * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([_Layer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    @property
    def _layer(self) -> _Layer:
        layer = self.layers[0]
        assert isinstance(layer, _Layer)
        return layer

    def before(self, embedded: Tensor, state: Tensor, positions: Tensor) -> tuple[Attending, Tensor]:
        """What is attended with, and the residual r [B, S, H].

        Args:
            embedded: of the next tokens, [B, S, H]. state: g [B, S, H]. positions: int64 [B, S].
        """
        layer = self._layer
        normed = layer.hidden_norm(state)
        both = torch.cat((layer.input_layernorm(embedded), normed), -1)
        return layer.self_attn(both, positions), normed if self.config.norm_before_residual else state

    def behind(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S, D] and s [B, S, H], of what attention gave, [B, heads, S, D]."""
        layer = self._layer
        middle = residual + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        state = middle + layer.mlp(layer.post_attention_layernorm(middle))
        return self.lm_head(self.norm(state)), state

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, base_states: Tensor, own_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, S, D] and s [B, S, H].

        Args:
            input_ids: int64 [B, S], of each position the token behind it. position_ids: int64 [B, S].
            base_states: [B, S, 3 H] of the base, 0 where it has computed none.
            own_states: s of the position before, [B, S, H]; 0 where the base's are there. `fc` of 0 is 0, so that one
                program serves both.
        """
        state = self.fc(base_states) + own_states
        with_, residual = self.before(self.embed_tokens(input_ids), state, position_ids)
        scale = float(self.config.head_dim) ** -0.5
        attended = torch.ops.optc.attention(*with_, None, None, scale=scale, causal=True, window=0, softcap=0.0)
        return self.behind(attended, residual)

    def load(self, tensors: dict[str, Tensor], embedding: Tensor) -> Eagle3:
        """Take the tensors of a folder, and the embedding [V, H] where they have none."""
        state = {EMBEDDING: embedding, **tensors}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(state[name])
        return self

    def tensors(self) -> dict[str, Tensor]:
        """All parameters by name but for the embedding."""
        return {name: item.detach() for name, item in self.named_parameters() if name != EMBEDDING}

"""The layer of EAGLE-3, number by number beside the formula of its paper."""

from __future__ import annotations

import pytest
import torch
from eagle3_models import SHAPE, small_draft
from torch import Tensor

EPS, HEADS, GROUPS, WIDTH = SHAPE.rms_norm_eps, SHAPE.num_attention_heads, SHAPE.num_key_value_heads, SHAPE.head_dim


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + EPS).sqrt() * weight


def turned(x: Tensor, position: int) -> Tensor:
    """A head [D] whose pairs (i, i + D / 2) are turned as complex numbers."""
    half = WIDTH // 2
    angle = torch.tensor([position / SHAPE.rope_theta ** (2 * i / WIDTH) for i in range(half)], dtype=torch.float64)
    whole = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((whole.real, whole.imag))


@pytest.mark.parametrize("norm_before_residual", [True, False])
def test_the_layer_is_that_of_the_paper(norm_before_residual: bool) -> None:
    """Token by token, head by head, in float64: the states of the base, and behind them the layer's own."""
    model = small_draft(norm_before_residual=norm_before_residual).double()
    w = dict(model.named_parameters())
    layer = "layers.0."
    ids = torch.tensor([7, 3, 9, 3, 11])
    base = torch.randn(5, 3 * SHAPE.hidden_size, dtype=torch.float64)
    base[3:] = 0  # two drafted tokens
    own = torch.zeros(5, SHAPE.hidden_size, dtype=torch.float64)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for place in range(5):
        g = w["fc.weight"] @ base[place] if place < 3 else own[place]
        e = norm(w["embed_tokens.weight"][ids[place]], w[layer + "input_layernorm.weight"])
        h = norm(g, w[layer + "hidden_norm.weight"])
        both = torch.cat((e, h))
        q, k, v = (w[f"{layer}self_attn.{part}_proj.weight"] @ both for part in "qkv")
        keys.append(torch.stack([turned(head, place) for head in k.view(GROUPS, WIDTH)]))
        values.append(v.view(GROUPS, WIDTH))
        heads = []
        for number, head in enumerate(q.view(HEADS, WIDTH)):
            group = number * GROUPS // HEADS
            scores = torch.stack([turned(head, place) @ key[group] for key in keys]) / WIDTH**0.5
            heads.append(sum(share * value[group] for share, value in zip(scores.softmax(0), values, strict=True)))
        a = (h if norm_before_residual else g) + w[layer + "self_attn.o_proj.weight"] @ torch.cat(heads)
        m = norm(a, w[layer + "post_attention_layernorm.weight"])
        gate, up = (w[f"{layer}mlp.{part}_proj.weight"] @ m for part in ("gate", "up"))
        state = a + w[layer + "mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
        logits = w["lm_head.weight"] @ norm(state, w["norm.weight"])
        if 3 <= place + 1 < 5:
            own[place + 1] = state
        with torch.no_grad():
            part = slice(0, place + 1)
            got = model(ids[None, part], torch.arange(place + 1)[None], base[None, part], own[None, part])
        torch.testing.assert_close(
            got[0][0, -1], logits, rtol=1e-5, atol=1e-5
        )  # norms and angles are float32 in the model
        torch.testing.assert_close(got[1][0, -1], state, rtol=1e-5, atol=1e-5)

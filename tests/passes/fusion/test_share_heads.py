"""share-heads: attention over repeated keys and values reads them as they were, whatever its mask is."""

from __future__ import annotations

import pytest
import torch
from stages import apply
from torch import Tensor, nn

from optc.compiler.analysis.attention_calls import SDPA
from optc.compiler.capture import capture_module
from optc.compiler.ir.verification import verify_program
from optc.passes.fusion.attention import FuseAttention
from optc.passes.fusion.share_heads import ShareHeads

HEADS, GROUPS, WIDTH, KEYS = 2, 3, 8, 11


class _Attention(nn.Module):
    """q [B,S,H*D] beside keys and values [B,Hkv,T,D], under a mask that says nothing of positions."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        batch, size = q.shape[:2]
        keys, values = (
            item[:, :, None].expand(-1, -1, GROUPS, -1, -1).reshape(batch, -1, KEYS, WIDTH) for item in (k, v)
        )
        heads = q.view(batch, size, -1, WIDTH).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, scale=0.3)
        return out.transpose(1, 2).contiguous().view(batch, size, -1)


def _inputs(size: int, batch: int = 2, mask_heads: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = draw(batch, mask_heads, size, KEYS) > -0.5
    mask[..., 0] = True
    kv = (draw(batch, HEADS, KEYS, WIDTH), draw(batch, HEADS, KEYS, WIDTH))
    return draw(batch, size, HEADS * GROUPS * WIDTH), *kv, mask


@pytest.mark.parametrize("size", [1, 5])
def test_keys_are_not_copied_for_query_heads(size: int) -> None:
    names = ["q", "k", "v", "mask"]
    program = capture_module(
        _Attention(), _inputs(size), input_names=names, dynamic={name: {0: "batch"} for name in names}
    )
    if size > 1:  # of one query it would be that of the keys
        assert apply(FuseAttention(), program).matched == 0
    result = apply(ShareHeads(), program)
    assert (result.matched, result.misses) == (1, ())
    verify_program(result.program, "share-heads")
    (call,) = result.program.calls(SDPA)
    assert [item.meta["val"].shape[1:] for item in call.args[:3]] == [
        (HEADS, GROUPS * size, WIDTH),
        *[(HEADS, KEYS, WIDTH)] * 2,
    ]
    for batch in (1, 3):
        inputs = _inputs(size, batch)
        torch.testing.assert_close(result.program(*inputs), program(*inputs), atol=1e-5, rtol=0)


def test_masks_that_differ_between_heads_are_left() -> None:
    program = capture_module(_Attention(), _inputs(4, mask_heads=HEADS * GROUPS), input_names=["q", "k", "v", "mask"])
    result = apply(ShareHeads(), program)
    assert result.matched == 0
    assert "differs between heads" in result.misses[0].reason

"""rotary_paged_attention_ is norm, rotary and paged_attention_; pools may have any strides; padding is not written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optc.compiler.ops.library import reference

_optc = torch.ops.optc
KNOBS = {"scale": 0.3, "window": 0, "softcap": 0.0}
NEW, TOTAL, BLOCK = (1, 3, 1), (6, 3, 1), 2


def inputs(heads: int = 4, kv_heads: int = 2, width: int = 8) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """q, k, v; pools; tables of three requests with `NEW` of `TOTAL` tokens, the last of which is padding."""
    generator = torch.Generator().manual_seed(1)
    qkv = [torch.randn(sum(NEW), count, width, generator=generator) for count in (heads, kv_heads, kv_heads)]
    pools = [torch.randn(6, BLOCK, kv_heads, width, generator=generator) for _ in range(2)]
    slots = torch.tensor([1 * BLOCK + 1, 0 * BLOCK, 0 * BLOCK + 1, 4 * BLOCK, -1])
    tables = torch.tensor([[3, 2, 1], [0, 4, 0], [7, 7, 7]], dtype=torch.int32)
    lengths, starts = torch.tensor(TOTAL, dtype=torch.int32), torch.tensor([0, 1, 4, 5], dtype=torch.int32)
    return qkv, pools, [slots, tables, lengths, starts]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [4, 8])
@pytest.mark.parametrize("norm", [False, True])
def test_is_norm_rotary_and_attention(interleaved: bool, rotated: int, norm: bool) -> None:
    (q, k, v), pools, tables = inputs()
    position, inv_freq = torch.tensor([5, 0, 1, 2, 0]), torch.tensor([1.0, 0.3, 0.1, 0.02][: rotated // 2])
    weights = [torch.rand(8) + 0.5, torch.rand(8) + 0.5] if norm else [None, None]
    turn: dict[str, Any] = {"scaling": 1.2, "interleaved": interleaved}
    same = [pool.clone() for pool in pools]
    found = _optc.rotary_paged_attention_(
        q, k, v, *pools, *tables, position, inv_freq, *weights, **turn, eps=1e-5, **KNOBS
    )

    def by_hand(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return _optc.rotary(x.transpose(0, 1)[None], position[None], inv_freq, **turn)[0].transpose(0, 1)

    rows = (by_hand(q, weights[0]), by_hand(k, weights[1]), v)
    torch.testing.assert_close(found, _optc.paged_attention_(*rows, *same, *tables, **KNOBS))
    for pool, other in zip(pools, same, strict=True):
        torch.testing.assert_close(pool, other)


def test_padding_and_strided_pools() -> None:
    """Pools that lie in memory as [blocks, heads, tokens, width] give the same; the padding token leaves no trace."""
    qkv, pools, tables = inputs()
    strided = [pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in pools]
    before = [pool.clone() for pool in pools]
    attend = reference("paged_attention_")  # a C++ kernel that the process has loaded takes contiguous pools
    found = attend(*qkv, *pools, *tables, **KNOBS)
    assert torch.equal(found, attend(*qkv, *strided, *tables, **KNOBS))
    assert torch.equal(found[4], torch.zeros(4, 8))
    assert (found[:4] != 0).all()
    for pool, other, old, new in zip(pools, strided, before, qkv[1:], strict=True):
        assert torch.equal(pool, other)
        changed = (pool != old).flatten(2).any(-1).nonzero().tolist()
        assert changed == [[0, 0], [0, 1], [1, 1], [4, 0]]
        assert torch.equal(pool[1, 1], new[0])

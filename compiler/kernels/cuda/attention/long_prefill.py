"""Long prompts by `scaled_dot_product_attention` over gathered keys and values.

cuDNN's kernels for it reach twice the rate of `prefill`, for which copying a request's blocks once is a small price.
Lengths have to be known on the host, which waits for the device; captured graphs hold no prompts.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from optc.compiler.kernels.cuda.attention.call import Call, turning, widths
from optc.compiler.kernels.cuda.attention.write import turn_heads
from optc.compiler.kernels.cuda.dispatch import dependent_launch, is_capturing

LONG = 1024
"""New tokens of a request from which on this is worth its wait and copies."""


def attend_long(call: Call, out: Tensor) -> bool:
    """Fill the rows of `out` of all requests with at least `LONG` new tokens and none before; whether there are any.

    The pools hold the new keys and values already.
    """
    if not _can(call):
        return False
    bounds = torch.cat([call.cu_seqlens, call.context_lens]).tolist()
    requests = call.block_tables.shape[0]
    starts, lengths = bounds[: requests + 1], bounds[requests + 1 :]
    found = [
        (request, starts[request], length)
        for request, length in enumerate(lengths)
        if starts[request + 1] - starts[request] == length >= LONG
    ]
    if not found or bool((call.slot_mapping < 0).any()):
        return False
    queries = _turned(call)
    for request, start, length in found:
        block = call.k_pool.shape[1]
        blocks = call.block_tables[request, : -(-length // block)].long()
        keys, values = (_gathered(pool, blocks, length) for pool in (call.k_pool, call.v_pool))
        rows = queries[start : start + length].transpose(0, 1)[None]
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            result = scaled_dot_product_attention(
                rows, keys, values, is_causal=True, scale=call.scale, enable_gqa=True
            )  # fmt: skip
        out[start : start + length] = result[0].transpose(0, 1)
    return True


def _can(call: Call) -> bool:
    """By shapes: long enough to hold such a request, and attention that the libraries know."""
    tokens, requests = call.q.shape[0], call.block_tables.shape[0]
    return (
        call.q.device.type == "cuda"
        and tokens >= LONG + requests - 1
        and not call.softcap
        and not call.window
        and call.q.dtype is not torch.float32
        and call.q.shape[2] == call.v.shape[2] <= 128
        and call.q.shape[2] % 8 == 0
        and not is_capturing(call.q.device)
    )


def _gathered(pool: Tensor, blocks: Tensor, length: int) -> Tensor:
    """[1, Hkv, length, D] of a request's blocks."""
    return torch.index_select(pool, 0, blocks).flatten(0, 1)[:length].transpose(0, 1)[None]


def _turned(call: Call) -> Tensor:
    """The queries after norm and rotary embedding."""
    if call.turn is None:
        return call.q
    turn, turned = turning(call)
    sizes = widths(call)
    target = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    pdl = dependent_launch(call.q.device)
    heads = call.q.shape[1]
    turn_heads[(call.q.shape[0],)](
        call.q, target, turn.position, turn.inv_freq, turn.q_norm, *call.q.stride()[:2], turn.scaling, turn.eps,
        HEADS=heads, HEAD_ROWS=triton.next_power_of_2(heads), D=sizes["D"], WIDTH=sizes["WIDTH"], PDL=pdl, **turned,
        launch_pdl=pdl,
    )  # fmt: skip
    return target

"""Attention of one long prompt by cuDNN, over its own queries, keys and values.

A prompt that has nothing before it needs nothing from the pool, into which its keys and values are written besides. Whether
a call is one the host says (`dispatch.whole_prompt`); where it does not, the device is asked, which knows the lengths, and
that only where no graph is captured and the products of a layer take milliseconds.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from optc.compiler.kernels.cuda.attention.call import Call, padded, turning
from optc.compiler.kernels.cuda.attention.turn import turn_and_write
from optc.compiler.kernels.cuda.dispatch import dependent_launch, is_capturing, told_prompt
from optc.compiler.kernels.cuda.paged_attention import LEAST_DENSE

TURN_WARPS = 4


def attend_prompt(call: Call, least: int = LEAST_DENSE) -> Tensor | None:
    """[tokens, H, D] of a call of one prompt, perhaps with padding behind, whose keys and values are written into the pool;
    None where it is something else, or what cuDNN does not take: then they may be written or not.

    Args:
        least: tokens below which a call is left to `prefill`; captured calls have fewer.
    """
    tokens = call.q.shape[0]
    if tokens < least or not _suits(call) or is_capturing(call.q.device):
        return None
    told = told_prompt()
    real = prompt_tokens(call) if told is None else told
    if not real:
        return None
    # Rows of padding stand behind all others, which do not see them: sizes repeat, for which cuDNN makes a plan each.
    q, k, v = (item.transpose(0, 1)[None] for item in (*turned_and_written(call), call.v))
    out = _causal(q, k, v, call.scale)
    if out is None:
        return None
    out = out[0].transpose(0, 1)
    out[real:] = 0.0
    return out.contiguous()


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """[1, H, tokens, D] of heads [1, H or fewer, tokens, D]; None where cuDNN has no such attention."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for contiguous in (False, True):  # a slice of a product is not taken by every version
            values = v.contiguous() if contiguous else v
            given = torch.backends.cuda.SDPAParams(q, k, values, None, 0.0, True, True)
            if torch.backends.cuda.can_use_cudnn_attention(given):
                return F.scaled_dot_product_attention(q, k, values, is_causal=True, scale=scale, enable_gqa=True)
    return None


def _suits(call: Call) -> bool:
    """By what is known on the host."""
    device = call.q.device
    halves = call.q.dtype in (torch.bfloat16, torch.float16) and dependent_launch(device)
    same = call.q.shape[2] == call.v.shape[2] and call.q.shape[2] in (64, 128)
    plain = call.turn is not None and not call.window and not call.softcap
    return same and plain and (halves or device.type == "cpu")


def prompt_tokens(call: Call) -> int | None:
    """Tokens of the only request of a call, all of its context; None where there are others, or earlier tokens."""
    real = call.slot_mapping >= 0
    behind = torch.where(real, torch.arange(1, len(real) + 1, device=real.device), 0).max()
    facts = torch.stack((call.cu_seqlens[1].long(), call.context_lens[0].long(), real.sum(), behind)).tolist()
    return int(facts[0]) if len(set(facts)) == 1 else None


def turned_and_written(call: Call) -> tuple[Tensor, Tensor]:
    """Queries and keys after norm and rotation, as tensors of their own; keys and values are in the pools as well then."""
    assert call.turn is not None
    turn, constants = turning(call)
    (tokens, query_heads, width), heads = call.q.shape, call.k.shape[1]
    q, k = (item.new_empty(item.shape) for item in (call.q, call.k))
    pdl = dependent_launch(q.device)
    turn_and_write[(tokens,)](
        call.q, call.k, call.v, call.k_pool, call.v_pool, call.slot_mapping, turn.position, turn.inv_freq,
        turn.q_norm, turn.k_norm, q, k, *call.q.stride()[:2], *call.k.stride()[:2], *call.v.stride()[:2],
        *call.k_pool.stride()[:3], *call.v_pool.stride()[:3], turn.scaling, turn.eps,
        GROUPS=query_heads // heads, HEADS=heads, HEAD_ROWS=triton.next_power_of_2(heads), D=width,
        WIDTH=padded(width), BLOCK=call.k_pool.shape[1], PDL=pdl, **constants, num_warps=TURN_WARPS, launch_pdl=pdl,
    )  # fmt: skip
    return q, k

"""Attention of one long prompt by cuDNN, over its own queries, keys and values.

A prompt that has nothing before it needs nothing from the pool, into which its keys and values are written besides. Whether
a call is one is known on the device, where lengths are; so it is asked, and that only where no graph is captured and the
products of a layer take milliseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from optc.compiler.kernels.cuda.attention.call import Call, padded, turning
from optc.compiler.kernels.cuda.attention.turn import count_real, turn_heads
from optc.compiler.kernels.cuda.dispatch import dependent_launch, is_capturing
from optc.compiler.kernels.cuda.paged_attention import LEAST_DENSE

TURN_WARPS = 4
FACTS, COUNTED = 4, 1024
"""Numbers that `count_real` finds; tokens that it looks at at a time."""


def attend_prompt(call: Call, least: int = LEAST_DENSE) -> Tensor | None:
    """[tokens, H, D] of a call of one prompt, perhaps with padding behind, whose keys and values are in the pool by now or
    will be; None where it is something else, or what cuDNN does not take.

    Args:
        least: tokens below which a call is left to `prefill`; captured calls have fewer.
    """
    tokens = call.q.shape[0]
    if tokens < least or not _suits(call) or is_capturing(call.q.device):
        return None
    answer = ask(call)  # while the host waits for it, heads are turned
    q, k, v = (item.transpose(0, 1)[None] for item in turned(call))
    real = answer()
    if real is None:
        return None
    # Rows of padding stand behind all others, which do not see them: sizes repeat, for which cuDNN makes a plan each.
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
    return same and not call.window and not call.softcap and (halves or device.type == "cpu")


def ask(call: Call) -> Callable[[], int | None]:
    """What gives, when the device has come so far, the tokens of the only request of a call, all of its context; None where
    there are others, or earlier tokens."""
    device, tokens = call.q.device, call.q.shape[0]
    facts = torch.empty(FACTS, dtype=torch.int64, device=device)
    count_real[(1,)](call.slot_mapping, call.cu_seqlens, call.context_lens, facts, tokens, BLOCK=COUNTED)
    copied = _read(facts)

    def answer() -> int | None:
        found = set(copied().tolist())
        return int(found.pop()) if len(found) == 1 else None

    return answer


def _read(facts: Tensor) -> Callable[[], Tensor]:
    """What gives numbers of a device on the host, and waits for them then, not for what is launched in between."""
    if not facts.is_cuda:
        return lambda: facts
    host = _pinned(facts.device).copy_(facts, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait


@functools.cache
def _pinned(_device: torch.device) -> Tensor:
    return torch.empty(FACTS, dtype=torch.int64, pin_memory=True)


def turned(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys after norm and rotation, and values."""
    if call.turn is None:
        return call.q, call.k, call.v
    turn, constants = turning(call)
    pdl = dependent_launch(call.q.device)
    found = []
    for source, norm in ((call.q, turn.q_norm), (call.k, turn.k_norm)):
        tokens, heads, width = source.shape
        out = source.new_empty((tokens, heads, width))
        turn_heads[(tokens,)](
            source, turn.position, turn.inv_freq, norm, out, *source.stride()[:2], turn.scaling, turn.eps,
            HEADS=heads, HEAD_ROWS=triton.next_power_of_2(heads), D=width, WIDTH=padded(width), PDL=pdl, **constants,
            num_warps=TURN_WARPS, launch_pdl=pdl,
        )  # fmt: skip
        found.append(out)
    return found[0], found[1], call.v

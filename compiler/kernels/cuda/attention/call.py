"""A call of paged attention, and what every launch for it derives from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
from torch import Tensor

LOG2E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Norm and rotary embedding of heads, see `optc::rotary_paged_attention_`."""

    position: Tensor
    inv_freq: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    scaling: float
    interleaved: bool
    eps: float


@dataclass(frozen=True, kw_only=True)
class Call:
    """The tensors of a call and how scores become weights, see `optc::paged_attention_`."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_pool: Tensor
    v_pool: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens: Tensor
    scale: float
    window: int
    softcap: float
    turn: Turn | None = None


def padded(size: int) -> int:
    """The power of two that holds `size`, 16 at least."""
    return max(16, triton.next_power_of_2(size))


def factors(call: Call) -> tuple[float, float]:
    """What `pages.scores` multiplies by."""
    if call.softcap:
        return call.scale / call.softcap, call.softcap * LOG2E
    return call.scale * LOG2E, 1.0


def turning(call: Call) -> tuple[Turn, dict[str, int | bool]]:
    """The turn, or one that does nothing, and its constants."""
    turn = call.turn
    if turn is None:
        nothing = Turn(
            position=call.slot_mapping, inv_freq=call.slot_mapping, q_norm=None, k_norm=None, scaling=1.0,
            interleaved=False, eps=0.0,
        )  # fmt: skip
        return nothing, {"ROTATED": 0, "INTERLEAVED": False}
    return turn, {"ROTATED": 2 * turn.inv_freq.shape[0], "INTERLEAVED": turn.interleaved}


def widths(call: Call) -> dict[str, int]:
    width, value_width = call.q.shape[2], call.v.shape[2]
    return {
        "HEADS": call.k.shape[1],
        "D": width,
        "WIDTH": padded(width),
        "DV": value_width,
        "VALUE_WIDTH": padded(value_width),
        "BLOCK": call.k_pool.shape[1],
    }

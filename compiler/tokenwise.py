"""Proof by trial that a decoder mixes tokens in its attention and nowhere else.

A KV cache is sound only then: feeding the tokens in pieces must change nothing but what attention
sees. With every attention replaced by a token-wise stand-in, the logits of a token may depend on
its id and its position alone, so permuting the tokens, or dropping some, must commute with the
model. A model that counts its own positions, averages over the sequence or convolves along it does
not commute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optc.compiler.program import Program
from optc.compiler.retrace import Replay, axis_limit

_ATTENTION = torch.ops.optc.attention.default
_TOKENS = 13
_KEPT = 5


def mixing_error(program: Program, *, seed: int = 0) -> float:
    """How much the logits of one token depend on the others when attention is cut; 0 is not at all.

    The largest difference over a permutation and a subset of 13 random tokens at random positions,
    relative to the largest logit. `program` takes input_ids and position_ids [B,S].
    """
    generator = torch.Generator().manual_seed(seed)
    limit = axis_limit(program.user_inputs()[0], program, 1) or 1 << 20
    count = min(_TOKENS, limit)
    vocabulary = _vocabulary(program)
    ids = torch.randint(0, vocabulary, (1, count), generator=generator)
    positions = torch.randint(0, limit, (1, count), generator=generator)

    def logits(chosen: Tensor) -> Tensor:
        replay = Replay(program, {_ATTENTION: _stand_in})
        with torch.no_grad():
            out: Tensor = replay.outputs(ids[:, chosen], positions[:, chosen])[0]
        return out[0].double()

    full = logits(torch.arange(count))
    order = torch.randperm(count, generator=generator)
    error = max(
        float((logits(chosen) - full[chosen]).abs().max()) for chosen in (order, order[: min(_KEPT, count)])
    )
    return error / max(float(full.abs().max()), 1e-30)


def mixing_tolerance(dtype: torch.dtype) -> float:
    """The error that rounding may cause: half the digits of the dtype.

    Matrix kernels sum in an order that depends on the number of rows (1e-7 in float32), mixing
    tokens moves logits by tenths.
    """
    return float(torch.finfo(dtype).eps ** 0.5)


def _vocabulary(program: Program) -> int:
    """Token ids below this number are safe to feed."""
    output = next(reversed(program.graph.nodes)).args[0]
    width = int(output[0].meta["val"].shape[-1])  # type: ignore[index, union-attr]
    return min(width, program.contract.model.vocab_size or width)


def _stand_in(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
    """A token-wise function of q, k and v in attention's output shape [B,H,S,Dv]."""
    q, k, v = args[:3]
    heads, width = q.shape[1], v.shape[3]
    total = torch.zeros((*q.shape[:3], width), dtype=v.dtype)
    for part in (q, k, v):
        wide = part.repeat_interleave(heads // part.shape[1], 1)
        times = -(-width // wide.shape[3])
        total = total + wide.repeat(1, 1, 1, times)[..., :width]
    return total

"""The numerics gate: how far a pass moved the logits, and whether it may.

A meaning-preserving pass must keep the logits within a dtype tolerance of the stage before. A lossy
pass must keep KL divergence, top-1 agreement and, on real text, perplexity within its budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optc.compiler.diagnostics import GateError
from optc.compiler.execution.drift import Drift
from optc.compiler.ir.program import Program

# Tolerance on logits, as a share of their largest magnitude (at least 1). A rewrite may reorder
# sums over a few thousand terms in each of some tens of layers.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float64: 1e-9}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a lossy pass may cost. `perplexity` is the largest relative increase (on text only)."""

    kl: float = math.inf
    top1: float = 0.0
    perplexity: float = math.inf

    @staticmethod
    def for_bits(bits: int) -> Budget:
        """Default budget of weight-only quantization; wide enough for small models, not for a wrong scale."""
        table = {8: (0.02, 0.9, 0.02), 4: (0.6, 0.5, 0.5), 3: (2.5, 0.2, 3.0), 2: (12.0, 0.0, math.inf)}
        kl, top1, perplexity = table.get(bits, (math.inf, 0.0, math.inf))
        return Budget(kl=kl, top1=top1, perplexity=perplexity)


ROUNDING = Budget(kl=2e-3, top1=0.95, perplexity=5e-3)
"""What a meaning-preserving pass may move in a program that rounds activations."""

_ROUNDING_OPS = ("quantize_dynamic", "quantize_tokens", "quantize", "quantize_nvfp4", "linear_dynamic")


def rounds_activations(program: Program) -> bool:
    """Whether a program rounds activations to codes while it runs."""
    names = {f"optc::{name}" for name in _ROUNDING_OPS}
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in names
        for node in program.graph.nodes
    )


def _worst_layer(drift: Drift, names: Sequence[str]) -> str | None:
    if not drift.layers:
        return None
    index = max(range(len(drift.layers)), key=lambda i: drift.layers[i])
    name = f" ({names[index]})" if index < len(names) else ""
    return f"layer {index}{name}, relative difference {drift.layers[index]:.2e}"


def check(
    name: str, drift: Drift, *, lossy: bool, budget: Budget, dtype: torch.dtype, layer_names: Sequence[str],
    rounds: bool = False,
) -> None:  # fmt: skip
    """Raise GateError when a pass moved the numbers by more than it may.

    Args:
        rounds: the program rounds activations to codes while it runs. A sum in another order then moves some of them
            to the next code, and a logit by far more than rounding: divergence is bounded instead, by `ROUNDING`.

    Raises:
        GateError: names the pass and the worst layer.
    """
    misses = []
    if not lossy and rounds and drift.kl is not None:
        budget = ROUNDING
    if not lossy and not (rounds and drift.kl is not None):
        limit = TOLERANCE.get(dtype, TOLERANCE[torch.float32]) * max(1.0, drift.scale)
        if not drift.max_abs_diff <= limit:
            misses.append(f"max abs difference {drift.max_abs_diff:.3g} > {limit:.3g} ({dtype})")
    else:
        if drift.kl is not None and not drift.kl <= budget.kl:
            misses.append(f"KL {drift.kl:.3g} > {budget.kl:.3g}")
        if drift.top1 is not None and not drift.top1 >= budget.top1:
            misses.append(f"top-1 agreement {drift.top1:.3f} < {budget.top1:.3f}")
        if drift.perplexity is not None and not drift.perplexity <= budget.perplexity:
            misses.append(f"perplexity {drift.perplexity:+.1%} > {budget.perplexity:+.1%}")
        if not math.isfinite(drift.max_abs_diff):
            misses.append("the outputs are not finite")
    if misses:
        raise GateError(
            f"pass '{name}' failed the numerics gate",
            where=_worst_layer(drift, layer_names),
            why="; ".join(misses),
            remedy="for a lossy pass choose more bits, a smaller group size or a wider budget; otherwise report a bug"
            if lossy
            else "this pass must not change the numbers: leave it out and report a bug with --dump-ir",
        )

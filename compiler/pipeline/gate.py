"""The numerics gate: how far a pass moved the logits, and whether it may.

A meaning-preserving pass must keep the logits within a dtype tolerance of the stage before. A lossy
pass must keep KL divergence, top-1 agreement and, on real text, perplexity within its budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optc.compiler.diagnostics import GateError
from optc.compiler.execution.stage_driver import StageRun, run_module, run_stage
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


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Difference of a stage from the one before.

    Attributes:
        max_abs_diff: largest absolute difference of the outputs.
        scale: largest magnitude of the outputs before.
        kl: mean KL(before || after) in nats per token; None for programs without logits.
        top1: share of tokens whose most likely successor is the same.
        perplexity: after / before - 1 over the gate's own text; None on random tokens.
        layers: per attention layer, relative L2 difference of its output.
    """

    max_abs_diff: float
    scale: float
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    layers: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the gate feeds: token sequences (ragged), or the tensors of a plain module."""

    sequences: tuple[tuple[int, ...], ...] = ()
    is_text: bool = False
    tensors: tuple[Tensor, ...] = field(default=())


def random_probe(vocab_size: int, seed: int = 0, longest: int = 40) -> Probe:
    """Random token sequences of unequal length, long enough to be prefilled, chunked and decoded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (longest, max(2, longest // 4), max(2, longest // 2), max(2, longest // 3))
    rows = tuple(tuple(torch.randint(0, vocab_size, (n,), generator=generator).tolist()) for n in lengths)
    return Probe(sequences=rows)


def text_probe(tokens: Sequence[int], longest: int = 96) -> Probe:
    """Ragged sequences cut from encoded text, long enough to be prefilled, chunked and decoded."""
    lengths, rows, start = (longest, longest // 4, longest // 2, longest // 3), [], 0
    for length in lengths:
        rows.append(tuple(tokens[start : start + length]))
        start += length
    return Probe(sequences=tuple(row for row in rows if row), is_text=True)


def run_probe(program: Program, probe: Probe) -> StageRun:
    """Run a stage on a probe; the outputs of a plain module count as logits without tokens."""
    if probe.sequences:
        return run_stage(program, probe.sequences)
    return StageRun(run_module(program, probe.tensors), [])


def _perplexity(logits: Sequence[Tensor], sequences: Sequence[Sequence[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(row[:-1].float(), torch.tensor(tokens[1:]), reduction="none")
        for row, tokens in zip(logits, sequences, strict=True)
        if len(tokens) > 1
    ]
    return math.exp(min(float(torch.cat(losses).double().mean()), 80.0))


def _relative(before: Tensor, after: Tensor) -> float:
    return float((after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-12))


def _layer_drift(before: StageRun, after: StageRun) -> tuple[float, ...]:
    if len(before.taps) != len(after.taps):
        return ()  # the pass made or removed attention operators; only the outputs can be compared
    rows = zip(before.taps, after.taps, strict=True)
    return tuple(_relative(torch.cat(list(old)), torch.cat(list(new))) for old, new in rows)


def measure(before: StageRun, after: StageRun, probe: Probe) -> Drift:
    """Compare two stages run on the same probe."""
    old, new = (_flat(run, bool(probe.sequences)) for run in (before, after))
    # NaN on both sides at the same place is no drift of this pass; NaN on one side is.
    gap = torch.where(old.isnan() & new.isnan(), 0.0, (new - old).abs())
    drift = {
        "max_abs_diff": float(gap.nan_to_num(nan=math.inf).max()),
        "scale": float(old.nan_to_num().abs().max()),
    }
    layers = _layer_drift(before, after)
    if not probe.sequences:
        return Drift(**drift, layers=layers)
    log_old, log_new = old.double().log_softmax(-1), new.double().log_softmax(-1)
    kl = float((log_old.exp() * (log_old - log_new)).sum(-1).mean())
    top1 = float((old.argmax(-1) == new.argmax(-1)).double().mean())
    ratio = None
    if probe.is_text:
        ratio = _perplexity(after.logits, probe.sequences) / _perplexity(before.logits, probe.sequences) - 1
    return Drift(**drift, kl=kl, top1=top1, perplexity=ratio, layers=layers)


def _flat(run: StageRun, tokens: bool) -> Tensor:
    """All outputs of a stage: [tokens, V], or one long vector for a plain module."""
    return torch.cat([row if tokens else row.reshape(-1) for row in run.logits]).float()


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

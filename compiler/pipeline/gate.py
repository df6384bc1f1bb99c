"""The numerics gate: how far a pass may move the outputs, from the stage before and, summed up, from the capture.

A meaning-preserving pass must keep them within a dtype tolerance. A lossy pass must keep to the budget that it states
itself: distributions by KL divergence, by their most likely token where the reference decides one, and on text by
perplexity; everything else by relative error and cosine. What has been lost since the capture is held to the sum of
the budgets (`total_budget`), or to what the user allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from optc.compiler.artifact.manifest import AllowedRecord
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.drift import Drift
from optc.compiler.execution.widened import ROUNDINGS, is_narrow
from optc.compiler.ir.program import Program
from optc.compiler.ops import library
from optc.compiler.pipeline.quantization_summary import finite
from optc.compiler.rewriting.budget import Budget, total_budget

# Tolerance on logits, as a share of their largest magnitude (at least 1). A rewrite may reorder
# sums over a few thousand terms in each of some tens of layers.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float64: 1e-9}

FLAT = 0.9
"""Entropy, as a share of the uniform distribution's, from which a model's own distribution is called nearly flat."""

DECIDED = 10
"""Rows with a decisive lead that it takes to judge the agreement of the most likely token."""

ROUNDING = Budget(kl=2e-3, top1=0.95, perplexity=5e-3, relative=0.05, cosine=0.998)
"""What a meaning-preserving pass may move in a program that rounds activations."""


def activation_roundings(program: Program) -> int:
    """How many of a program's calls round activations to codes while it runs."""
    calls = ((library.find(node.target), node.kwargs) for node in program.graph.nodes)
    return sum(spec is not None and spec.rounds_activations(keywords) for spec, keywords in calls)


def rounds_activations(program: Program) -> bool:
    """Whether a program rounds activations to codes while it runs."""
    return activation_roundings(program) > 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the user allows a whole compile to lose; None leaves a measure to the passes' budgets.

    A limit wider than a pass's own budget widens that too: one step may lose what the whole may.

    Attributes:
        kl, perplexity, relative: as in `Budget`. top1: least agreement over all tokens, decided or not.
    """

    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    relative: float | None = None


PASSES_OWN = Limits()
"""The sum of the passes' own budgets."""

UNLIMITED = Limits(kl=math.inf, top1=0.0, perplexity=math.inf, relative=math.inf)
"""For models whose outputs mean nothing, such as random weights in a benchmark of speed."""


@dataclass
class Ledger:
    """What the passes that ran so far may have lost."""

    budgets: list[Budget] = field(default_factory=list)
    exact: int = 0

    def note(self, budget: Budget | None, restores: bool = False) -> None:
        """Add a pass: its budget, or None for one that keeps the numbers.

        One that restores them adds nothing to what was lost before it.
        """
        if budget is None:
            self.exact += 1
        elif not (restores and self.budgets):
            self.budgets.append(budget)

    @property
    def total(self) -> Budget | None:
        """The budget of all passes together; None while none of them has one."""
        return total_budget(self.budgets) if self.budgets else None


Rounding = Callable[[], Drift | None]
"""How far the stage before is from itself in float32, measured when it is asked for; None where that cannot be said."""


def tolerance_misses(drift: Drift, dtype: torch.dtype, passes: int = 1, rounding: Rounding | None = None) -> list[str]:
    """What speaks against passes that keep the numbers: each rounds anew, so their errors add up as squares do.

    In 16 bits the errors of a deep model grow beyond any fixed share of its outputs. What is beyond it is held to what
    rounding makes of the stage before, which differs from its own float32 as much as two right computations do.
    """
    limit = TOLERANCE.get(dtype, TOLERANCE[torch.float32]) * max(1.0, drift.scale) * math.sqrt(passes)
    if drift.max_abs_diff <= limit:
        return []
    misses = [f"max abs difference {drift.max_abs_diff:.3g} > {limit:.3g} ({dtype})"]
    if rounding is None or not is_narrow(dtype) or not math.isfinite(drift.max_abs_diff):
        return misses  # what is infinite, or of another shape, no rounding explains
    own = rounding()
    if own is None:
        return misses
    times = ROUNDINGS * math.sqrt(passes)
    if drift.max_abs_diff <= times * own.max_abs_diff and drift.relative <= times * own.relative:
        return []
    return [
        *misses,
        f"relative error {drift.relative:.3g}, where rounding to {dtype} makes {own.relative:.3g} of the stage before",
    ]


def step_misses(drift: Drift, budget: Budget, limits: Limits) -> list[str]:
    """What speaks against a lossy pass: each measure over the wider of its budget and the user's limit."""
    return _misses(
        drift,
        budget,
        kl=max(budget.kl, limits.kl or 0.0),
        top1=budget.top1 if limits.top1 is None else min(budget.top1, limits.top1),
        perplexity=max(budget.perplexity, limits.perplexity or 0.0),
        relative=max(budget.relative, limits.relative or 0.0),
    )


def total_misses(drift: Drift, budget: Budget, limits: Limits) -> list[str]:
    """What speaks against a stage: each measure over the user's limit, or where there is none over the sum."""
    misses = _misses(
        drift,
        budget,
        top1=budget.top1 if limits.top1 is None else 0.0,
        always_relative=limits.relative is not None,
        **_total_limits(budget, limits),
    )
    if limits.top1 is not None and drift.top1 is not None and not drift.top1 >= limits.top1:
        misses.append(f"top-1 agreement {drift.top1:.3f} < {limits.top1:.3f}")
    return misses


def _total_limits(budget: Budget, limits: Limits) -> dict[str, float]:
    """What all passes together may cost: the user's limit, or where there is none the sum of the budgets."""
    names = ("kl", "perplexity", "relative")
    return {name: getattr(budget if getattr(limits, name) is None else limits, name) for name in names}


def allowed_total(budget: Budget | None, limits: Limits) -> AllowedRecord | None:
    """What the passes so far may have lost since the capture, as a manifest has it.

    Args:
        budget: of all of them, see `Ledger.total`; None while they keep the numbers.
    """
    if budget is None:
        return None
    most = {name: finite(value) for name, value in _total_limits(budget, limits).items()}
    return AllowedRecord(
        relative_error=most["relative"],
        kl=most["kl"],
        top1_agreement=limits.top1,
        perplexity_increase=most["perplexity"],
    )


def _misses(
    drift: Drift,
    budget: Budget,
    *,
    kl: float,
    top1: float,
    perplexity: float,
    relative: float,
    always_relative: bool = False,
) -> list[str]:
    misses = []
    if drift.kl is not None and not drift.kl <= kl:
        misses.append(f"KL {drift.kl:.3g} > {kl:.3g}")
    decided, agreement = drift.decided(budget.decisive_lead)
    if decided >= DECIDED and not agreement >= top1:
        misses.append(f"top-1 agreement {agreement:.3f} < {top1:.3f} ({decided} decided tokens)")
    if decided < DECIDED or always_relative:
        if not drift.relative <= relative:
            misses.append(f"relative error {drift.relative:.3g} > {relative:.3g}")
        least = budget.cosine if relative <= budget.relative else min(budget.cosine, _cosine_of(relative))
        if not drift.cosine >= least and not math.isinf(relative):
            misses.append(f"cosine {drift.cosine:.4f} < {least:.4f}")
    if drift.perplexity is not None and not drift.perplexity <= perplexity:
        misses.append(f"perplexity {drift.perplexity:+.1%} > {perplexity:+.1%}")
    if not math.isfinite(drift.max_abs_diff):
        misses.append("the outputs are not finite")
    return misses


def _cosine_of(relative: float) -> float:
    """The least cosine of vectors whose difference is this share of the first."""
    return math.sqrt(1.0 - relative**2) if relative <= 1.0 else -1.0


def worst_layer(drift: Drift, names: Sequence[str]) -> str | None:
    """The attention layer that moved the most."""
    if not drift.layers:
        return None
    index = max(range(len(drift.layers)), key=lambda i: drift.layers[i])
    name = f" ({names[index]})" if index < len(names) else ""
    return f"layer {index}{name}, relative difference {drift.layers[index]:.2e}"


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a stage.

    Attributes:
        name: of the pass. drift: from the stage before. since_capture: from the capture.
        budget: of the pass; None for one that keeps the numbers.
    """

    name: str
    drift: Drift
    since_capture: Drift
    budget: Budget | None
    dtype: torch.dtype
    lossy: bool

    def check(
        self, ledger: Ledger, limits: Limits, layer_names: Sequence[str], rounding: Rounding | None = None
    ) -> None:
        """Raise when the pass lost more than it may, or all passes together more than they may.

        Args:
            ledger: with this pass in it.
            rounding: of the stage before; asked only where a fixed tolerance does not settle it.

        Raises:
            GateError: names the pass and the worst layer.
        """
        if self.budget is None:
            misses = tolerance_misses(self.drift, self.dtype, rounding=rounding)
        else:
            misses = step_misses(self.drift, self.budget, limits)
        if misses:
            remedy = _LOSSY if self.lossy else _EXACT
            raise self._error(f"pass '{self.name}' failed the numerics gate", self.drift, misses, remedy, layer_names)
        total = ledger.total
        if total is None:
            misses = tolerance_misses(self.since_capture, self.dtype, ledger.exact, rounding)
        else:
            misses = total_misses(self.since_capture, total, limits)
        if misses:
            what = f"pass '{self.name}' failed the numerics gate: too much is lost since the capture"
            raise self._error(what, self.since_capture, misses, _SUM, layer_names)

    def _error(
        self, what: str, drift: Drift, misses: Sequence[str], remedy: str, layer_names: Sequence[str]
    ) -> GateError:
        why = "; ".join(misses)
        if drift.flatness >= FLAT:
            assert drift.entropy is not None
            why += (
                f"; the model's own distribution is nearly flat: entropy {drift.entropy:.2f} of "
                f"log({drift.classes}) = {math.log(drift.classes):.2f} nats"
            )
            remedy = f"{_NOTHING_TO_LOSE}; else {remedy}"
        return GateError(what, where=worst_layer(drift, layer_names), why=why, remedy=remedy)


_LOSSY = (
    "choose more bits, a smaller group size, or a wider limit (--max-kl, --min-top1, --max-perplexity-increase, "
    "--max-relative-error)"
)
_EXACT = "this pass must not change the numbers: leave it out and report a bug with --dump-ir"
_SUM = "choose more bits, fewer lossy passes, or a wider limit on the sum (--max-kl, --min-top1, --max-perplexity-increase, --max-relative-error)"
_NOTHING_TO_LOSE = (
    "logits of random or untrained weights say nothing about quality: compile a trained model, or widen the limits if only "
    "speed matters"
)

"""How far two programs that say the same may be from each other, where both round activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optc.compiler.artifact.manifest import DriftRecord, PassRecord
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import ROUNDING, rounds_activations
from optc.compiler.rewriting.budget import Budget

REROUNDED = 1.5
"""In a deep model a few moved codes move all that follow, until most of the rounding is another draw. Two draws of an
error are sqrt(2) times as far from each other as each is from none."""


def rerounding(passes: Sequence[PassRecord]) -> float:
    """Relative error that another order of sums may make of a program that rounds activations.

    It follows what rounding them cost in this compile, as its gate measured it; errors of several passes add as squares.
    0 where no pass of this compile rounded activations.
    """
    return REROUNDED * math.hypot(*(drift.relative_error or 0.0 for drift in _roundings(passes)))


def rerounding_budget(passes: Sequence[PassRecord]) -> Budget:
    """What a pass that keeps the meaning may move in a program that rounds activations: `ROUNDING`, or what another draw
    of the same rounding costs where that is more, as its gate measured it. KL and 1 - cosine grow as squares of errors.
    """
    drifts, square = _roundings(passes), REROUNDED**2
    kl = square * sum(drift.kl or 0.0 for drift in drifts)
    changed = REROUNDED * sum(1.0 - (1.0 if drift.top1_agreement is None else drift.top1_agreement) for drift in drifts)
    turned = square * sum(1.0 - (1.0 if drift.cosine is None else drift.cosine) for drift in drifts)
    increase = REROUNDED * sum(abs(drift.perplexity_increase or 0.0) for drift in drifts)
    return Budget(
        kl=max(ROUNDING.kl, kl),
        top1=max(0.0, min(ROUNDING.top1, 1.0 - changed)),
        perplexity=max(ROUNDING.perplexity, increase, kl),
        relative=max(ROUNDING.relative, rerounding(passes)),
        cosine=max(-1.0, min(ROUNDING.cosine, 1.0 - turned)),
    )


def _roundings(passes: Sequence[PassRecord]) -> list[DriftRecord]:
    return [record.drift for record in passes if record.rounds_activations and record.drift]


def widened(tolerance: float, rounded: float, program: Program, rerounding: float, allowed: float) -> float:
    """Of the file that was written of a program, as the check that opens it holds the two to each other.

    Args:
        tolerance: of the engine. rounded: the least that it becomes where the program rounds activations.
        rerounding: see above, of this compile. allowed: the relative error that the user allows the whole compile.
    """
    widest = max(tolerance, allowed)
    return max(widest, rounded, rerounding) if rounds_activations(program) else widest

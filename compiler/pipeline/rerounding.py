"""How far a file may be from the program that it was written of, where both round activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optc.compiler.artifact.manifest import PassRecord
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import rounds_activations

REROUNDED = 1.5
"""In a deep model a few moved codes move all that follow, until most of the rounding is another draw. Two draws of an
error are sqrt(2) times as far from each other as each is from none."""


def rerounding(passes: Sequence[PassRecord]) -> float:
    """Relative error that another order of sums may make of a program that rounds activations.

    It follows what rounding them cost in this compile, as its gate measured it; errors of several passes add as squares.
    0 where no pass of this compile rounded activations.
    """
    drifts = [record.drift for record in passes if record.rounds_activations and record.drift]
    return REROUNDED * math.hypot(*(drift.relative_error or 0.0 for drift in drifts))


def widened(tolerance: float, rounded: float, program: Program, rerounding: float, allowed: float) -> float:
    """Of the file that was written of a program, as the check that opens it holds the two to each other.

    Args:
        tolerance: of the engine. rounded: the least that it becomes where the program rounds activations.
        rerounding: see above, of this compile. allowed: the relative error that the user allows the whole compile.
    """
    widest = max(tolerance, allowed)
    return max(widest, rounded, rerounding) if rounds_activations(program) else widest

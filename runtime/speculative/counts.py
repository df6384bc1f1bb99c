"""What an engine counts of its drafts."""

from __future__ import annotations

import numpy as np

from optc.compiler.execution.paged_call import Ints
from optc.runtime.speculative.figures import SpeculativeFigures
from optc.runtime.speculative.settings import Speculation
from optc.runtime.speculative.shape import Ladder, Shape
from optc.runtime.speculative.switch import Switch


class DraftCounts:
    """Since the start.

    Attributes:
        verified, drafted, drafted_at, accepted_at: as `SpeculativeFigures` has them, the last two int64 [draft tokens].
    """

    def __init__(self, options: Speculation, switch: Switch | None, ladder: Ladder) -> None:
        self._options, self._switch, self._ladder = options, switch, ladder
        self.verified = self.drafted = 0
        self.drafted_at, self.accepted_at = np.zeros((2, options.draft_tokens), np.int64)

    def note(self, drafted: Ints, kept: Ints, shape: Shape | None) -> None:
        """Drafts that were verified, of a token at least: int64 [R] each, their tokens and those that were kept."""
        self.verified += len(drafted)
        self.drafted += int(drafted.sum())
        places = np.arange(len(self.drafted_at))
        deep = drafted if shape is None else np.maximum.accumulate(shape.depths)[drafted]
        self.drafted_at += (deep[:, None] > places).sum(0)
        self.accepted_at += (kept[:, None] > places).sum(0)

    def figures(self, draft_seconds: float = 0.0) -> SpeculativeFigures:
        """The counts, and the draft of now."""
        switch, ladder = self._switch, self._ladder
        rung = len(ladder.rungs) if switch is None else switch.best
        shape = None if ladder.shapes is None or not rung else ladder.shapes[rung - 1]
        return SpeculativeFigures(
            method=self._options.method,
            verified=self.verified,
            drafted=self.drafted,
            drafted_at=self.drafted_at.tolist(),
            accepted_at=self.accepted_at.tolist(),
            draft_seconds=draft_seconds,
            depth=(len(ladder.rungs[rung - 1]) if rung else 0) if shape is None else int(shape.depths.max()),
            tree=0 if shape is None or shape.is_chain else len(shape),
            speedup=None if switch is None else switch.speedup,
        )

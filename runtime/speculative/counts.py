"""What an engine counts of its drafts."""

from __future__ import annotations

import numpy as np

from optc.runtime.speculative.figures import SpeculativeFigures
from optc.runtime.speculative.settings import Speculation
from optc.runtime.speculative.switch import Switch


class DraftCounts:
    """Since the start.

    Attributes:
        verified, drafted_at, accepted_at: as `SpeculativeFigures` has them, the last two int64 [draft tokens].
    """

    def __init__(self, options: Speculation, switch: Switch | None) -> None:
        self._options, self._switch = options, switch
        self.verified = 0
        self.drafted_at, self.accepted_at = np.zeros((2, options.draft_tokens), np.int64)

    def figures(self, draft_seconds: float = 0.0) -> SpeculativeFigures:
        """The counts, and the depth of now."""
        switch = self._switch
        return SpeculativeFigures(
            method=self._options.method,
            verified=self.verified,
            drafted_at=self.drafted_at.tolist(),
            accepted_at=self.accepted_at.tolist(),
            draft_seconds=draft_seconds,
            depth=self._options.draft_tokens if switch is None else switch.best,
            speedup=None if switch is None else switch.speedup,
        )

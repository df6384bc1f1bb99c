"""How many steps that follow each other on a device are launched at once, so that what the host does for them is hidden."""

from __future__ import annotations

import math
import statistics

_SECONDS = 1.2e-3
"""What the steps of a launch should take at least: no client sees it."""
_SPARE = 1.5
"""Times what the host does for a launch: it is done in time then, also when it takes longer for once."""
_LOOKED_AT = 16
"""Launches after which the next ones are counted anew."""


class Pace:
    """Counts the steps of the next launches by what a step takes.

    Args:
        first: steps of the first launches. most: of any.

    Attributes:
        steps: of a launch.
        fixed: they stay so many, for measuring.
    """

    def __init__(self, first: int, most: int) -> None:
        self.steps, self.fixed, self._most = first, False, most
        self._took: list[tuple[float, float]] = []

    def fix(self, steps: int) -> None:
        """So many from now on."""
        self.steps, self.fixed = steps, True

    def note(self, seconds: float, host: float = 0.0) -> None:
        """What a step took in a launch that followed another without a pause, and what the host did meanwhile."""
        self._took.append((seconds, host))
        if len(self._took) == _LOOKED_AT:
            if not self.fixed:
                step, host = map(statistics.median, zip(*self._took, strict=True))
                self.steps = max(1, min(self._most, math.ceil(max(_SECONDS, _SPARE * host) / step)))
            self._took.clear()

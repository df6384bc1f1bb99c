"""What the processor spends on a step outside the model."""

from __future__ import annotations

_WEIGHT = 0.02


class HostTime:
    """A mean of the last launches, some fifty of them.

    Attributes:
        mean_us: microseconds per step.
    """

    def __init__(self) -> None:
        self.mean_us = 0.0
        self._launches = 0

    def note(self, seconds: float, steps: int = 1) -> None:
        """Of one more step, or of some that were launched at once."""
        self._launches += 1
        self.mean_us += (seconds * 1e6 / steps - self.mean_us) * max(_WEIGHT, 1 / self._launches)

"""Memory per rank of a training run, predicted before it starts."""

from __future__ import annotations

import msgspec


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted bytes on each rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations

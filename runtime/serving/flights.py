"""Steps that were launched on a device, and whose tokens are on their way to the host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optc.runtime.serving.plan import Chosen
from optc.runtime.serving.rows import Ints
from optc.runtime.serving.step_buffers import StepBuffers

Given = Callable[[Ints], Chosen]


@dataclass(slots=True)
class Flight:
    """A launch: its tokens on the way to the host, where those of interest are among them, and what it gives once they are
    there.

    Attributes:
        steps: that it is of, where they are alike.
        follows: it was launched before the one in front of it had landed.
    """

    tokens: Tensor
    order: Ints
    given: Given
    arrived: torch.cuda.Event | None
    steps: int = 0
    follows: bool = False


class Took(NamedTuple):
    """Seconds of each step of a launch, and of what the host did between the landing before and the wait for this one."""

    step: float
    host: float


class Flights:
    """Launches in their order.

    Attributes:
        waited_s: seconds since the start in which the host waited for them.
    """

    def __init__(self, buffers: StepBuffers) -> None:
        self._buffers = buffers
        self._under_way: deque[Flight] = deque()
        self._landed_at = 0.0
        self.waited_s = 0.0

    def of(self, tokens: Tensor, order: Ints, given: Given) -> Flight:
        """What was launched last brings its tokens to the host."""
        host, arrived = self._buffers.bring(tokens), None
        if tokens.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return Flight(host, order, given, arrived)

    def add(self, flight: Flight, steps: int = 0) -> None:
        """It is the next to land but for those that are under way."""
        flight.steps, flight.follows = steps, bool(self._under_way)
        self._under_way.append(flight)

    def land(self) -> tuple[Chosen, Took | None]:
        """What the oldest gives, and what it took, where that can be told."""
        flight, begin = self._under_way.popleft(), time.perf_counter()
        if flight.arrived is not None:
            flight.arrived.synchronize()
        now = time.perf_counter()
        self.waited_s += now - begin
        told = flight.follows and flight.steps
        took = Took((now - self._landed_at) / flight.steps, begin - self._landed_at) if told else None
        self._landed_at = now
        return flight.given(flight.tokens.numpy()[flight.order]), took

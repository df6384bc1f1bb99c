"""Brings the tokens of a decode step to the host while the next one runs."""

from __future__ import annotations

import torch


class TokenReader:
    """Brings the tokens of a step to the host while the next one runs."""

    def __init__(self, batch: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = [torch.zeros(batch, dtype=torch.int64, pin_memory=cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self._newest = 0

    def start(self, tokens: torch.Tensor) -> None:
        """Begin to copy the tokens of the first step."""
        self._copy(tokens)

    def turn(self, tokens: torch.Tensor) -> list[int]:
        """Begin to copy the tokens of the step that was just started; returns those of the one before."""
        before = self._newest
        self._newest = 1 - before
        self._copy(tokens)
        return self._read(before)

    def last(self) -> list[int]:
        """The tokens of the newest step."""
        return self._read(self._newest)

    def _copy(self, tokens: torch.Tensor) -> None:
        self._host[self._newest].copy_(tokens, non_blocking=True)
        if self._events:
            self._events[self._newest].record()

    def _read(self, index: int) -> list[int]:
        if self._events:
            self._events[index].synchronize()
        found: list[int] = self._host[index].tolist()
        return found

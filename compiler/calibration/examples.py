"""Calibration of plain modules: the tensors of example calls in place of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Inputs of calls of a module.

    Attributes:
        batches: for each call its inputs, in the order of the contract; rows are on the first axis.
    """

    batches: tuple[tuple[Tensor, ...], ...]

    def __getitem__(self, calls: slice) -> Examples:
        return Examples(self.batches[calls])

    def numel(self) -> int:
        """Rows of all calls: what tokens are to a language model."""
        return sum(int(inputs[0].shape[0]) if inputs and inputs[0].dim() else 1 for inputs in self.batches)

    def data(self) -> bytes:
        """All of it as bytes, for digests."""
        parts = (tensor for inputs in self.batches for tensor in inputs)
        return b"".join(
            f"{tensor.dtype}{tuple(tensor.shape)}".encode()
            + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            for tensor in parts
        )

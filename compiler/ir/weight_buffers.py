"""Buffers for weights that are in memory for a moment, used again and again.

A weight that is read from its file is freed after one product, and the next one needs as many pages. The system hands out
zeroed pages at 2 to 10 GB/s, under a hypervisor that takes freed memory back at 0.5 GB/s, which is slower than reading the
weight and multiplying with it together.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST = 1 << 20  # bytes; smaller tensors come from the heap
KEPT_BYTES = 1 << 30
"""Free buffers that are kept, at most, in bytes."""


class BufferPool:
    """Uninitialized tensors whose memory goes to the next one when nothing holds it any more; threads may share one."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self.kept_bytes = kept_bytes
        self._free: list[Tensor] = []
        self._lock = threading.RLock()  # a block may come back while its thread takes another

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size < _LEAST:
            return torch.empty(tuple(shape), dtype=dtype)
        block = self._take(size)
        array = block.numpy()  # the tensor's storage holds this object; it is gone with the last view of the tensor
        weakref.finalize(array, self._give_back, block).atexit = False
        return torch.from_numpy(array)[:size].view(dtype).view(tuple(shape))

    def _take(self, size: int) -> Tensor:
        """The smallest free block that is large enough, and not twice as large; else a new one."""
        with self._lock:
            fitting = [block for block in self._free if size <= len(block) <= 2 * size]
            if fitting:
                chosen = min(fitting, key=len)
                self._free = [block for block in self._free if block is not chosen]
                return chosen
        return torch.empty(size, dtype=torch.uint8)

    def _give_back(self, block: Tensor) -> None:
        """Keep a block, in place of those that were free for longest where there are too many."""
        with self._lock:
            self._free.append(block)
            while sum(map(len, self._free)) > self.kept_bytes:
                del self._free[0]


WEIGHTS = BufferPool()
"""Of the whole process."""

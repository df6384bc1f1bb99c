"""Counts what autograd keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedTensors:
    """Within `with`, counts the bytes of the tensors that autograd saves; each storage counts once.

    First derivatives only. What selective checkpointing caches does not pass through autograd: see `LiveTensors`.

    Args:
        weights: tensors that do not count: parameters live anyway.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        weights = list(weights)
        self._skip = {_storage(weight) for weight in weights}
        self._shapes = {shape for item in weights if item.dim() == 2 for shape in (item.shape, item.t().shape)}
        self._sizes: dict[int, int] = {}
        self._copies: set[int] = set()
        self._held: list[Tensor] = []  # keeps storages alive, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        key, detached = _storage(tensor), tensor.detach()
        if key not in self._skip and key not in self._sizes:
            self._sizes[key] = tensor.untyped_storage().nbytes()
            self._held.append(detached)
            if tensor.shape in self._shapes:
                self._copies.add(key)
        return detached  # the tensor itself would hold the node that holds it

    @property
    def bytes(self) -> int:
        """Bytes saved so far."""
        return sum(self._sizes.values())

    @property
    def weight_copies(self) -> int:
        """Bytes of those that have the shape of a weight or its transpose: autocast's copies. They do not grow with
        the batch. (Right where the number of tokens is no weight's size.)"""
        return sum(self._sizes[key] for key in self._copies)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._held.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class LiveTensors(TorchDispatchMode):
    """Within `with`, follows every tensor that ops make: bytes alive now, and the most so far.

    Works on any device and with fake tensors. Each storage counts once, from the op that made it until it is
    freed; tensors made before do not count. Scratch memory inside an op is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the op and register the storages of its outputs."""
        outputs = func(*args, **(kwargs or {}))
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and _storage(leaf) not in known:
                self._add(leaf)
        return outputs

    def _add(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        size = tensor.untyped_storage().nbytes()
        old = self._alive.get(key)
        if old is not None and not old[0].expired():
            return
        if old is not None:
            self._now -= old[1]
        self._alive[key] = (StorageWeakRef(tensor.untyped_storage()), size)
        self._now += size
        if self._now > self.peak:  # counts what was freed since the last sweep, so sweep before believing it
            self.peak = max(self.peak, self.bytes)

    @property
    def bytes(self) -> int:
        """Bytes alive now."""
        for key in [key for key, (reference, _) in self._alive.items() if reference.expired()]:
            self._now -= self._alive.pop(key)[1]
        return self._now

"""Linear caches in torch tensors, for graphs that run in this process: eager Programs and packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from optc.compiler.ir.contract import CACHE_ROLES, HELD_ROLES, STATE_ROLE, Contract, Input
from optc.runtime.sessions.linear import Ids, LinearSession, held_shape, lazy_zeros
from optc.runtime.sessions.session import Logits

CPU = torch.device("cpu")
Run = Callable[..., Any]
"""A graph: its inputs, flat and in the order of the contract -> its output or outputs."""


class TorchSession(LinearSession):
    """A session over a linear-cache graph with torch tensors in and out.

    Args:
        run: the graph.
        contract: its contract, of kv_cache kind "linear"; `in_place` says whether the graph writes
            the caches itself or returns grown copies of them.
    """

    def __init__(self, run: Run, contract: Contract) -> None:
        assert contract.kv_cache.kind == "linear"
        super().__init__(contract)
        self._graph, self._contract = run, contract
        self._caches: list[torch.Tensor] = []

    def _allocate(self, batch: int, capacity: int, keep: int) -> None:
        old, self._caches = self._caches, []
        for index, spec in enumerate(held_inputs(self._contract)):
            cache = torch_zeros(held_shape(spec, batch, capacity), spec.dtype)
            if keep and spec.role == STATE_ROLE:
                cache.copy_(old[index])
            elif keep:
                cache[:, :, :keep] = old[index][:, :, :keep]
            self._caches.append(cache)

    def _run(self, ids: Ids, mask: Ids, rows: slice) -> Logits:
        whole = len(ids) == self._batch
        caches = self._caches if whole else [cache[rows] for cache in self._caches]
        with torch.inference_mode():
            outputs = self._graph(torch.from_numpy(ids), torch.from_numpy(mask), *caches)
            outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
            if not self._contract.kv_cache.in_place:
                for cache, grown in zip(caches, outputs[1:], strict=True):
                    cache.copy_(grown)
        return to_logits(outputs[0])

    def close(self) -> None:
        self._caches = []


def cache_inputs(contract: Contract) -> list[Input]:
    """The inputs that are caches or pools, in order: key and value of each layer."""
    return [spec for spec in contract.inputs if spec.role in CACHE_ROLES]


def held_inputs(contract: Contract) -> list[Input]:
    """The inputs that hold what a row was fed: caches, and states of recurrent layers."""
    return [spec for spec in contract.inputs if spec.role in HELD_ROLES]


def torch_zeros(shape: Sequence[int], dtype: str, device: torch.device = CPU) -> torch.Tensor:
    """A tensor of zeros; on the CPU its memory is taken when it is first written."""
    kind: torch.dtype = getattr(torch, dtype)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=kind, device=device)
    size = int(np.prod(shape)) * kind.itemsize
    return torch.from_numpy(lazy_zeros((size,), np.uint8)).view(kind).view(*shape)


def to_logits(tensor: torch.Tensor) -> Logits:
    """A logits tensor as a float32 array, without a copy where it is one already."""
    return tensor.detach().float().cpu().numpy()

"""A stand-in for CUDA graphs on the CPU: operators recorded with their tensors, and run again into the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optc.runtime.sessions.cuda_graphs import Launch


class Recordings:
    """A `Recorder`. What a recorded function decided on the host stays decided, as in a CUDA graph.

    Attributes:
        names: of what was recorded, in order. replays: how often each was run.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.replays: list[int] = []

    def __call__(self, what: str, launch: Launch) -> Launch:
        with _Recorder() as recorder:
            launch()
        for _, _, _, results in recorder.calls:
            for result in results:
                if result.is_floating_point():
                    result.fill_(torch.nan)  # recording does not compute
        place = len(self.names)
        self.names.append(what)
        self.replays.append(0)

        def replay() -> None:
            self.replays[place] += 1
            for func, args, kwargs, results in recorder.calls:
                for old, new in zip(results, _tensors(func(*args, **kwargs)), strict=False):
                    old.copy_(new)

        return replay


class _Recorder(TorchDispatchMode):
    """Calls, each with the results that are in memory of their own: those of views and of writes are not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = {item.untyped_storage().data_ptr() for item in [*args, *kwargs.values()] for item in _tensors(item)}
        own = [item for item in _tensors(made) if item.untyped_storage().data_ptr() not in given]
        if own or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, own))
        return made


def _tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, Tensor)]

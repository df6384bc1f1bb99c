"""CUDA graphs: what a function launches is recorded once and launched again without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.generated_code import last_call

Launch = Callable[[], None]
"""Reads fixed tensors and writes fixed tensors; which kernels it launches depends on shapes alone."""
Recorder = Callable[[str, Launch], Launch]
"""From a name, for messages, and a function that has run before, to one that does what this did when it was recorded.
Recording makes the memory of its results, and does not fill it."""


def graph_recorder() -> Recorder:
    """Records CUDA graphs that share memory, as no two of them run at the same time; their results are apart.

    The recorder raises TargetError where something cannot be recorded.
    """
    memory: Any = torch.cuda.graph_pool_handle()

    def record(what: str, launch: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=memory):
                launch()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _not_recorded(what, error) from error
        return graph.replay

    return record


def _not_recorded(what: str, error: RuntimeError) -> TargetError:
    """The error for what cannot be recorded, with the call of the program where it ended."""
    first: BaseException = error
    while isinstance(first.__context__, Exception):  # the end of the capture fails as well, and hides why
        first = first.__context__
    return TargetError(
        f"{what} of the program cannot be captured in a CUDA graph",
        where=last_call(first),
        why=f"{type(first).__name__}: {str(first).splitlines()[0]}",
        remedy="report this with the model's config",
    )

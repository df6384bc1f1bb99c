"""CUDA graphs: what a function launches is recorded once and launched again without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from optc.compiler.diagnostics import ResourceError, TargetError, ran_out_of_memory
from optc.compiler.ir.generated_code import last_call

Launch = Callable[[], None]
"""Reads fixed tensors and writes fixed tensors; which kernels it launches depends on shapes alone."""
Recorder = Callable[[str, Launch], Launch]
"""From a name, for messages, and a function that has run before, to one that does what this did when it was recorded.
Recording makes the memory of its results, and does not fill it."""


def graph_recorder() -> Recorder:
    """Records CUDA graphs that share memory, as no two of them run at the same time; their results are apart.

    The recorder raises TargetError where something cannot be recorded, ResourceError where memory is exhausted.
    """
    memory: Any = torch.cuda.graph_pool_handle()

    def record(what: str, launch: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=memory):
                launch()
        except RuntimeError as error:
            if ran_out_of_memory(error):  # the end of the capture fails as well, in another way
                raise _no_memory(what) from error
            raise _not_recorded(what, error) from error
        return graph.replay

    return record


def _no_memory(what: str) -> ResourceError:
    return ResourceError(
        f"the GPU has no memory left in which {what} of the program could be captured",
        remedy="open it with a smaller pool (--kv-blocks), or end what else uses the GPU",
    )


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

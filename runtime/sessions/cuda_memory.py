"""What a program needs of a GPU's memory, said before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optc.compiler.diagnostics import ResourceError
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.ir.saved.tensors import memory_of
from optc.runtime.sessions.paged import block_bytes, default_blocks
from optc.runtime.sessions.session import UNKNOWN_CONTEXT

_LIBRARIES = 512 << 20
"""The CUDA context, kernels, and the workspaces of libraries and of captured graphs."""
_READ_BYTES = 2 << 30
_SHARE = 0.95
"""Of what is free when weights and working memory are counted, for the KV pool: the rest is left to fragmentation."""
_LIVE = 4
"""Times the largest activation of a call that lives at once: what is read, what is written, and their likes."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device.

    Attributes:
        weights: of the program. working: activations of the largest call, libraries, graphs.
        pool: of the KV cache, in `num_blocks` blocks.
    """

    weights: int
    working: int
    pool: int
    num_blocks: int

    @property
    def total(self) -> int:
        return self.weights + self.working + self.pool


def plan_memory(program: Program, free: int, *, chunk: int, num_blocks: int | None = None) -> MemoryPlan:
    """How much memory a program takes of a device that has `free` bytes free.

    Args:
        chunk: most tokens of a call.
        num_blocks: of the KV pool; None takes 8 full contexts, or fewer where those do not fit.

    Raises:
        ResourceError: weights, working memory and the pool (or, where its size is open, one full context, or as
            much of it as 1024 tokens) do not fit.
    """
    contract = program.contract
    weights = weight_bytes(program)
    working = _LIBRARIES + activation_bytes(program, chunk)
    block = block_bytes(contract)
    room = free - weights - working
    count = num_blocks or default_blocks(contract, max(0, math.floor(room * _SHARE)))
    plan = MemoryPlan(weights, working, count * block, count)
    if plan.total > free or (num_blocks is None and count < _least_blocks(contract)):
        least = plan if num_blocks else MemoryPlan(weights, working, _least_blocks(contract) * block, 0)
        raise ResourceError(
            "the program does not fit the GPU's memory",
            why=f"it needs {_gb(least.total)} ({_gb(weights)} of weights, {_gb(working)} to work in, "
            f"{_gb(least.pool)} of KV pool); {_gb(free)} are free",
            remedy="quantize the weights (--quant), use fewer --kv-blocks, or a GPU with more memory",
        )
    return plan


def weight_bytes(program: Program) -> int:
    """Bytes of all weights; one that is read under two names counts once."""
    return sum(
        tensor.nbytes for tensor in {memory_of(item) or id(item): item for _, item in program.weights()}.values()
    )


def activation_bytes(program: Program, tokens: int) -> int:
    """Bytes of activations that live at once in a call of so many tokens."""
    largest = 0
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.dim() and value.dim() < 4:
            fixed = [size for size in value.shape if isinstance(size, int)]
            open_axes = value.dim() - len(fixed)
            if open_axes == 1:
                largest = max(largest, math.prod(fixed) * value.dtype.itemsize)
    return _LIVE * largest * tokens


def _least_blocks(contract: Contract) -> int:
    tokens = min(contract.model.context_length or UNKNOWN_CONTEXT, 1024)
    return -(-tokens // contract.kv_cache.block_size)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that is free now."""
    return int(torch.cuda.mem_get_info(device)[0])


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which a GPU sums float32 numbers, the best of some runs; a little below what it can read."""
    size = min(_READ_BYTES, free_bytes(device) // 2)
    numbers = torch.zeros(size // 4, device=device)
    best = math.inf
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        numbers.sum()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return numbers.nbytes / best * 1e3

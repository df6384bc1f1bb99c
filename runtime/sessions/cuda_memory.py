"""What a program needs of a GPU's memory, said before anything is loaded."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optc.compiler.diagnostics import ResourceError
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.ir.saved.tensors import memory_of
from optc.compiler.kernels.cuda.dispatch import dependent_launch
from optc.runtime.sessions.paged import PREFILL_CHUNK, block_bytes, default_blocks
from optc.runtime.sessions.prompt_call import token_sizes
from optc.runtime.sessions.session import UNKNOWN_CONTEXT

_LIBRARIES = 512 << 20
"""The CUDA context, kernels, and the workspaces of libraries and of captured graphs."""
_READ_BYTES = 2 << 30
_SHARE = 0.95
"""Of what is free when all else is counted, for the KV pool or for copies: the rest is left to fragmentation."""
_PROMPTS_SHARE = 1 / 8
"""Of what is free when weights and working memory are counted, for the graphs of prompts, at most."""
LONG_CHUNK = 8192
"""Tokens of the largest call of a program whose products take longer than their launches: a prompt of more than
`PREFILL_CHUNK` is then one call, and cuDNN attends to one that fills it."""
_LARGE, _LONG_SHARE = 2 << 30, 1 / 16
"""Bytes of weights from which products take as long; of what is free, what such a call works in at most."""
_LIVE = 4
"""Times the largest activation of a call that lives at once: what is read, what is written, and their likes."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, but for `num_blocks`, `prompt_tokens` and `chunk`.

    Attributes:
        weights: of the program. working: activations of the largest call, libraries, graphs of steps.
        pool: of the KV cache, in `num_blocks` blocks.
        prompts: what graphs of prompts hold, which share their memory: activations of the largest one.
        prompt_tokens: size of that one; larger calls, and all of them where it is 0, are not captured, and those up to
            `PREFILL_CHUNK` not padded.
        chunk: most tokens of a call.
    """

    weights: int
    working: int
    pool: int
    num_blocks: int
    prompts: int = 0
    prompt_tokens: int = 0
    chunk: int = PREFILL_CHUNK

    @property
    def total(self) -> int:
        return self.weights + self.working + self.pool + self.prompts


def plan_for(
    program: Program, device: torch.device, *, num_blocks: int | None = None, loaded: bool = False
) -> MemoryPlan:
    """The plan for a program on a GPU; `loaded` says that its weights are there already.

    Raises:
        ResourceError: it does not fit.
    """
    gc.collect()  # programs refer to themselves: what passes left lives until then
    torch.cuda.empty_cache()
    free = free_bytes(device) + (weight_bytes(program) if loaded else 0)
    chunk = longest_call(program, free) if dependent_launch(device) else PREFILL_CHUNK
    return plan_memory(program, free, chunk=chunk, num_blocks=num_blocks)


def longest_call(program: Program, free: int) -> int:
    """Most tokens of a call on a device with `free` bytes, for which cuDNN's attention is faster than ours."""
    fits = call_bytes(program, LONG_CHUNK) <= _LONG_SHARE * free
    return LONG_CHUNK if weight_bytes(program) >= _LARGE and fits else PREFILL_CHUNK


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
    working = _LIBRARIES + call_bytes(program, chunk)
    block = block_bytes(contract)
    room = free - weights - working
    prompt_tokens, prompts = _captured(
        program, min(chunk, PREFILL_CHUNK), min(room * _PROMPTS_SHARE, room - (num_blocks or 0) * block)
    )
    count = num_blocks or default_blocks(contract, max(0, math.floor((room - prompts) * _SHARE)))
    plan = MemoryPlan(weights, working, count * block, count, prompts, prompt_tokens, chunk)
    if plan.total > free or (num_blocks is None and count < _least_blocks(contract)):
        pool = plan.pool if num_blocks else _least_blocks(contract) * block
        raise ResourceError(
            "the program does not fit the GPU's memory",
            why=f"it needs {_gb(weights + working + pool)} ({_gb(weights)} of weights, {_gb(working)} to work in, "
            f"{_gb(pool)} of KV pool); {_gb(free)} are free",
            remedy="quantize the weights (--quant), use fewer --kv-blocks, or a GPU with more memory",
        )
    return plan


def _captured(program: Program, chunk: int, most_bytes: float) -> tuple[int, int]:
    """The size of the largest prompt whose graph holds no more than `most_bytes`, and what it holds; zeros for none.

    All sizes up to a whole chunk are worth it: where products take longer than their launches, padding is a tile of them.
    """
    if program.contract.input_index("logits_indices") is not None:
        none = call_bytes(program, 0)
        per_token = call_bytes(program, 1) - none  # one walk through the graph for all sizes
        for tokens in reversed(token_sizes(chunk)):
            held = none + per_token * tokens
            if held <= most_bytes:
                return tokens, held
    return 0, 0


def weight_bytes(program: Program) -> int:
    """Bytes of all weights; one that is read under two names counts once."""
    return sum(
        tensor.nbytes for tensor in {memory_of(item) or id(item): item for _, item in program.weights()}.values()
    )


def call_bytes(program: Program, tokens: int) -> int:
    """Bytes that a call of so many tokens works in: activations, and the largest packed weight, for cuBLAS."""
    return activation_bytes(program, tokens) + dequantized_bytes(program)


def dequantized_bytes(program: Program) -> int:
    """Bytes of the largest packed weight in the type that is computed in: products of many tokens take it so."""
    largest = 0
    for node in program.calls(torch.ops.optc.fused_linear.default):
        x, weight = (item.meta["val"] for item in node.args[:2])
        if node.kwargs.get("format"):
            largest = max(largest, weight.shape[0] * x.shape[-1] * x.dtype.itemsize)
    return largest


def activation_bytes(program: Program, tokens: int) -> int:
    """Bytes of activations that live at once in a call of so many tokens; the logits of selected rows are none of them."""
    place = program.contract.input_index("input_ids")
    assert place is not None
    (axis,) = program.user_inputs()[place].meta["val"].shape
    largest = 0
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.dim() and value.dim() < 4:
            fixed = [size for size in value.shape if isinstance(size, int)]
            (open_axis, *others) = [str(size) for size in value.shape if not isinstance(size, int)] or [""]
            if open_axis == str(axis) and not others:
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


def left_beside(plan: MemoryPlan, device: torch.device) -> int:
    """Bytes that a plan leaves, when its weights and pool are on the device and nothing has run yet."""
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, math.floor((free_bytes(device) + reusable - plan.working - plan.prompts) * _SHARE))


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

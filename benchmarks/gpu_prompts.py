"""Time from a prompt to its first token on a GPU, launched call by call and replayed, beside what the card can do.

Used by `gpu_decode.py`. No two prompts are alike, so that none finds its beginning in the pool. Launched: the first call
of a size, kernels compiled. Recorded: the second one. The floor is the larger of two: the bytes that a step has to read
at the rate of the fastest streaming kernel, and the products of all tokens at the rate of a large one of cuBLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gpu_timing import time_per_call

from optc.compiler.ir.program import Program
from optc.runtime.generation.generate import generate
from optc.runtime.measuring.benchmark import median_rate
from optc.runtime.sessions.cuda import CudaSession

PROMPTS = (128, 512, 1024, 2048)
_SQUARE = 8192


def first_tokens(
    session: CudaSession, lengths: list[int], samples: int, step_bytes: int, bytes_per_s: float, flops_per_s: float
) -> dict[str, Any]:
    """Milliseconds for prompts of each length, medians with their 95 % intervals, and what their graphs took."""
    rng = np.random.default_rng(2)
    found: dict[str, Any] = {}

    def first_token(length: int) -> float:
        prompt = rng.integers(0, session.vocab_size, (1, length)).tolist()
        return generate(session, prompt, max_new_tokens=1).ttft_ms

    for length in lengths:
        compiling = first_token(length)
        launched = []
        for _ in range(samples):
            session._prompts.clear()
            launched.append(first_token(length))
        free = torch.cuda.mem_get_info()[0]
        recorded = first_token(length)
        graph_bytes = free - torch.cuda.mem_get_info()[0]
        replayed = [first_token(length) for _ in range(samples)]
        bytes_ms = step_bytes / bytes_per_s * 1e3
        flops_ms = prompt_flops(session.program, length) / flops_per_s * 1e3
        found[str(length)] = {
            "compiling_ms": compiling,
            "launched_ms": median_rate(launched).to_dict(),
            "recorded_ms": recorded,
            "replayed_ms": median_rate(replayed).to_dict(),
            "floor_ms": {"bytes": bytes_ms, "flops": flops_ms},
            "graph_bytes": graph_bytes,
        }
        print(f"prompt of {length}:", found[str(length)], flush=True)
    return found


def prompt_flops(program: Program, tokens: int) -> float:
    """Of the products of a prompt and of its causal attention; the head is of one token."""
    total, vocabulary = 0.0, program.contract.model.vocab_size
    for node in program.calls(torch.ops.optc.fused_linear.default):
        x, weight = (item.meta["val"] for item in node.args[:2])
        rows = 1 if weight.shape[0] == vocabulary else tokens
        total += 2.0 * rows * weight.shape[0] * x.shape[-1]
    for node in program.calls(torch.ops.optc.rotary_paged_attention_.default, torch.ops.optc.paged_attention_.default):
        total += 2.0 * tokens * tokens * node.args[0].meta["val"].shape[1:].numel()  # two products of half a square
    return total


def matmul_rate() -> float:
    """FLOP per second of a product of squares in bf16."""
    a, b = (torch.randn(_SQUARE, _SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * _SQUARE**3 / time_per_call([lambda: a @ b])

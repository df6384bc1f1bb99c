"""Time from a prompt to its first token on a GPU, launched call by call and replayed, beside what the card can do.

Used by `gpu_decode.py`. No two prompts are alike, so that none finds its beginning in the pool. Launched: the first call
of a size, kernels compiled. Recorded: the second one. The floor is the larger of two: the bytes that a step has to read
at the rate of the fastest streaming kernel, and the products of all tokens at the rate of a large one of cuBLAS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
        kernels = kernel_times(partial(first_token, length))
        bytes_ms = step_bytes / bytes_per_s * 1e3
        flops_ms = prompt_flops(session.program, length) / flops_per_s * 1e3
        found[str(length)] = {
            "compiling_ms": compiling,
            "launched_ms": median_rate(launched).to_dict(),
            "recorded_ms": recorded,
            "replayed_ms": median_rate(replayed).to_dict(),
            "floor_ms": {"bytes": bytes_ms, "flops": flops_ms},
            "graph_bytes": graph_bytes,
            "kernels_ms": sum(entry["us"] for entry in kernels.values()) / 1e3,
            "kernels": kernels,
        }
        shown = {name: value for name, value in found[str(length)].items() if name != "kernels"}
        print(f"prompt of {length}:", shown, flush=True)
        for name, entry in list(kernels.items())[:12]:
            print(f"    {entry['us']:8.1f} us  {entry['count']:4d}  {name}", flush=True)
    return found


def kernel_times(run: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """Microseconds and calls of each kernel of a run, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found: dict[str, dict[str, Any]] = {}
    for event in profiler.events():
        if "CUDA" in str(event.device_type):
            entry = found.setdefault(event.name[:70], {"us": 0.0, "count": 0})
            entry["us"] += event.time_range.elapsed_us()
            entry["count"] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


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

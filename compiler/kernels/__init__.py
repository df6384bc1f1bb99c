"""Implementations of ops of the dialect, one folder per device. Importing this package registers every kernel."""

from optc.compiler.kernels.cpu import fused_experts as cpu_fused_experts
from optc.compiler.kernels.cpu import linear_attention, linear_few, linear_nbits
from optc.compiler.kernels.cpu import paged_attention as cpu_paged_attention
from optc.compiler.kernels.cuda import (
    draft_round,
    fused_experts,
    fused_linear,
    fused_norm,
    greedy_step,
    packed_embedding,
    sampler,
    select_rows,
)
from optc.compiler.kernels.cuda import paged_attention as cuda_paged_attention

__all__ = [
    "cpu_fused_experts",
    "cpu_paged_attention",
    "cuda_paged_attention",
    "draft_round",
    "fused_experts",
    "fused_linear",
    "fused_norm",
    "greedy_step",
    "linear_attention",
    "linear_few",
    "linear_nbits",
    "packed_embedding",
    "sampler",
    "select_rows",
]

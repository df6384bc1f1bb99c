"""Launches of the choice of tokens, over which scratch memory."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import dependent_launch, scratch
from optc.compiler.kernels.cuda.sampling.choose import GROUP, STATISTICS, choose

CHUNK = 4096
"""Tokens of the vocabulary that a program looks at."""
BLOCK = 1024
"""Tokens of the list of a row that are compared with thresholds at a time."""
WARPS = 8


def sample_(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    repetition_penalty: Tensor | None, presence_penalty: Tensor | None, frequency_penalty: Tensor | None,
    seen: Tensor | None, counts: Tensor | None, seed: Tensor, step: Tensor, *, chunk: int = CHUNK, block: int = BLOCK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op on CUDA."""
    rows, vocabulary = logits.shape
    device = logits.device
    logprobs = torch.empty(rows, device=device)
    cuts = (top_k, top_p, min_p)
    maxima = listed = listed_ids = None
    if any(cut is not None for cut in cuts):
        maxima = torch.empty(rows, triton.cdiv(vocabulary, GROUP.value), device=device)
        listed = torch.empty(rows, vocabulary, device=device)
        listed_ids = torch.empty(rows, vocabulary, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    marks = None if seen is None else seen.view(torch.uint8)
    _launch(
        logits, (temperature, *cuts, repetition_penalty, presence_penalty, frequency_penalty, marks, counts, seed, step),
        tokens, logprobs, (maxima, listed, listed_ids), chunk, block, greedy=False,
    )  # fmt: skip
    return tokens, logprobs


def argmax(logits: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The op on CUDA."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch(logits, (None,) * 11, tokens, None, (None,) * 3, chunk, BLOCK, greedy=True)
    return tokens


def _launch(
    logits: Tensor, parameters: tuple[Tensor | None, ...], tokens: Tensor, logprobs: Tensor | None,
    lists: tuple[Tensor | None, ...], chunk: int, block: int, *, greedy: bool,
) -> None:  # fmt: skip
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    chunks = triton.cdiv(vocabulary, chunk)
    statistics, best, arrivals = _scratch(logits.device, rows, chunks)
    pdl = dependent_launch(logits.device)
    if rows:
        choose[(chunks, rows)](
            logits, *parameters, tokens, logprobs, statistics, best, *lists, arrivals, logits.stride(0), vocabulary,
            CHUNK=chunk, CHUNKS=triton.next_power_of_2(chunks), BLOCK=block, GREEDY=greedy,
            CUTS=lists[0] is not None, PDL=pdl,
            num_warps=WARPS, launch_pdl=pdl,
        )  # fmt: skip


@scratch
def _scratch(device: torch.device, rows: int, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """What chunks leave, and arrivals."""
    statistics = torch.empty(rows, chunks, STATISTICS.value, device=device)
    best = torch.empty(rows, chunks, 2, dtype=torch.int32, device=device)
    return statistics, best, torch.zeros(rows, dtype=torch.int32, device=device)

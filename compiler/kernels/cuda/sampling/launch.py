"""Launches of the choice of tokens, over which scratch memory."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import dependent_launch, scratch
from optc.compiler.kernels.cuda.sampling.choose import GROUP, choose
from optc.compiler.kernels.cuda.sampling.cuts import cut_and_choose
from optc.compiler.kernels.cuda.sampling.row import STATISTICS

CHUNK = 4096
"""Tokens of the vocabulary that a program looks at."""
BLOCK = 2048
"""Tokens of the list of a row that are compared with thresholds at a time."""
WARPS = 8


def sample_(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    repetition_penalty: Tensor | None, presence_penalty: Tensor | None, frequency_penalty: Tensor | None,
    seen: Tensor | None, counts: Tensor | None, seed: Tensor, step: Tensor, *, chunk: int = CHUNK, block: int = BLOCK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op on CUDA."""
    rows, vocabulary = logits.shape
    logprobs = torch.empty(rows, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens, logprobs
    logits = _in_rows(logits)
    cuts, marks = (top_k, top_p, min_p), None if seen is None else seen.view(torch.uint8)
    any_cut = any(cut is not None for cut in cuts)
    parameters = (
        temperature,
        *cuts,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        marks,
        counts,
        seed,
        step,
    )
    grid, options = (triton.cdiv(vocabulary, chunk), rows), _options(logits, chunk, block)
    statistics, best, arrivals = _scratch(logits.device, rows, grid[0])
    maxima, *left, lengths = _cut_scratch(logits.device, rows, vocabulary) if any_cut else (None,) * 4
    sizes = (logits.stride(0), vocabulary)
    choose[grid](
        logits, *parameters, tokens, logprobs, statistics, best, arrivals, maxima, *left, *sizes, GREEDY=False,
        **options,
    )  # fmt: skip
    if any_cut:
        listed = torch.empty(rows, vocabulary, device=logits.device)
        listed_ids = torch.empty(rows, vocabulary, dtype=torch.int32, device=logits.device)
        cut_and_choose[grid](
            logits, *parameters, tokens, logprobs, statistics, arrivals, *left, listed, listed_ids, lengths, *sizes,
            **options,
        )  # fmt: skip
    return tokens, logprobs


def argmax(logits: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The op on CUDA."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        logits = _in_rows(logits)
        grid = (triton.cdiv(vocabulary, chunk), rows)
        left = _scratch(logits.device, rows, grid[0])
        choose[grid](
            logits, *(None,) * 11, tokens, None, *left, *(None,) * 3, logits.stride(0), vocabulary, GREEDY=True,
            **_options(logits, chunk, BLOCK),
        )  # fmt: skip
    return tokens


def _in_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _options(logits: Tensor, chunk: int, block: int) -> dict[str, int | bool]:
    """What all launches are given. Products and sums stay apart: kernels must find the same scores."""
    pdl = dependent_launch(logits.device)
    chunks = triton.next_power_of_2(triton.cdiv(logits.shape[1], chunk))
    return {
        "CHUNK": chunk,
        "CHUNKS": chunks,
        "BLOCK": block,
        "PDL": pdl,
        "num_warps": WARPS,
        "launch_pdl": pdl,
        "enable_fp_fusion": False,
    }


@scratch
def _scratch(device: torch.device, rows: int, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """What chunks leave, and arrivals."""
    statistics = torch.empty(rows, chunks, STATISTICS.value, device=device)
    best = torch.empty(rows, chunks, 2, dtype=torch.int32, device=device)
    return statistics, best, torch.zeros(rows, dtype=torch.int32, device=device)


@scratch
def _cut_scratch(device: torch.device, rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maxima of groups, scores and candidates that rows are left with, and lengths of lists."""
    maxima = torch.empty(rows, triton.cdiv(vocabulary, GROUP.value), device=device)
    candidates = torch.empty(rows, dtype=torch.int32, device=device)
    return maxima, torch.empty(rows, device=device), candidates, torch.zeros(rows, dtype=torch.int32, device=device)

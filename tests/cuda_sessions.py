"""A program as the CUDA target makes it, and what its sessions shall draw."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rewrites import stirred

from optc.compiler.ir.program import Program
from optc.compiler.ops.library import reference
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.options import CompileOptions
from optc.runtime.generation.sampling import draws_of
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.session import Session
from optc.targets.inductor_cuda import TARGET

LENGTHS = (21, 9, 62)
"""Tokens of prompts; the last one fills its block two steps later."""
MIXED = [
    Sampling(temperature=1.5, top_k=40, min_p=0.02, seed=3),
    Sampling(),
    Sampling(temperature=0.8, top_p=0.9, seed=9),
]
"""One for each of the prompts."""
PENALIZED = [
    Sampling(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7, seed=3),
    Sampling(repetition_penalty=1.8),
    Sampling(temperature=0.8, top_p=0.9, seed=9),
]
"""The same, of which two look at the tokens of their rows."""


@functools.cache
def compiled(family: str = "llama", layers: int = 2, heads: str | None = None, expose: tuple[int, ...] = ()) -> Program:
    """A tiny model after the target's recipe, on the CPU, with the Medusa heads of a folder, or states of some layers."""
    medusa = None if heads is None else Path(heads)
    return lowered(stirred(family, layers=layers), medusa=medusa, expose_hidden=expose)


def lowered(program: Program, **options: Any) -> Program:
    """A program after the target's recipe."""
    chosen = CompileOptions(dtype="fp32", own=TARGET.options(), **options)
    for step in TARGET.recipe("decoder", chosen):
        program = step.rewrite.run(program, PassContext()).program
    return program


def drawn(
    session: Session, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], count: int
) -> list[list[int]]:
    """Generation written out: logits on the host, `sample_` at the position of the token that was fed."""
    draws = draws_of(samplings, prompts)
    logits, tokens = session.prefill(prompts), [list[int]() for _ in prompts]
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    counts = torch.zeros(logits.shape, dtype=torch.int32)
    for _ in range(count):
        chosen, _ = reference("sample_")(
            torch.from_numpy(logits),
            torch.tensor([sampling.temperature for sampling in samplings]),
            torch.tensor([sampling.top_k for sampling in samplings], dtype=torch.int32),
            torch.tensor([sampling.top_p for sampling in samplings]),
            torch.tensor([sampling.min_p for sampling in samplings]),
            torch.tensor([sampling.repetition_penalty for sampling in samplings]),
            torch.tensor([sampling.presence_penalty for sampling in samplings]),
            torch.tensor([sampling.frequency_penalty for sampling in samplings]),
            seen,
            counts,
            torch.tensor([draw.seed for draw in draws]),
            torch.tensor(session.lengths) - 1,
        )
        for row, token in zip(tokens, chosen.tolist(), strict=True):
            row.append(token)
        logits = session.decode(chosen.tolist())
    return tokens

"""What is fed to two stages that are to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optc.compiler.execution.stage_driver import StageRun, run_module, run_stage
from optc.compiler.ir.program import Program


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the gate feeds: token sequences (ragged), or the tensors of a plain module."""

    sequences: tuple[tuple[int, ...], ...] = ()
    is_text: bool = False
    tensors: tuple[Tensor, ...] = field(default=())

    @property
    def text(self) -> tuple[tuple[int, ...], ...]:
        """The sequences where they are text, else nothing."""
        return self.sequences if self.is_text else ()


def random_probe(vocab_size: int, seed: int = 0, longest: int = 40) -> Probe:
    """Random token sequences of unequal length, long enough to be prefilled, chunked and decoded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (longest, max(2, longest // 4), max(2, longest // 2), max(2, longest // 3))
    rows = tuple(tuple(torch.randint(0, vocab_size, (n,), generator=generator).tolist()) for n in lengths)
    return Probe(sequences=rows)


def text_probe(tokens: Sequence[int], longest: int = 96) -> Probe:
    """Ragged sequences cut from encoded text, long enough to be prefilled, chunked and decoded."""
    lengths, rows, start = (longest, longest // 4, longest // 2, longest // 3), [], 0
    for length in lengths:
        rows.append(tuple(tokens[start : start + length]))
        start += length
    return Probe(sequences=tuple(row for row in rows if row), is_text=True)


def run_probe(program: Program, probe: Probe) -> StageRun:
    """Run a stage on a probe; of a plain module each output is an entry of `logits`."""
    if probe.sequences:
        return run_stage(program, probe.sequences)
    return StageRun(run_module(program, probe.tensors), [], role="output")

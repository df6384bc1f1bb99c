"""What is fed to two stages that are to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optc.compiler.execution.stage_driver import StageRun, run_module, run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.known_products import KnownProducts
from optc.compiler.rewriting.made_weights import MadeWeights
from optc.compiler.rewriting.retrace import Replay


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the gate feeds: token sequences (ragged), or the tensors of a plain module.

    Attributes:
        steps: single tokens that a stage with a cache is fed at the end of each sequence.
        cross: what each sequence of a decoder that reads an encoder reads, see `run_stage`.
    """

    sequences: tuple[tuple[int, ...], ...] = ()
    is_text: bool = False
    tensors: tuple[Tensor, ...] = field(default=())
    steps: int = 3
    cross: tuple[tuple[Tensor, ...], ...] = field(default=())

    def without(self, token: int, vocabulary: int) -> Probe:
        """The same with the next token in place of this one."""
        rows = (tuple((item + 1) % vocabulary if item == token else item for item in row) for row in self.sequences)
        return replace(self, sequences=tuple(rows))

    @property
    def text(self) -> tuple[tuple[int, ...], ...]:
        """The sequences where they are text, else nothing."""
        return self.sequences if self.is_text else ()


STREAMED_TOKENS = 24
"""Length of the longest sequence for programs whose weights stay in files; see `for_streaming`."""


def for_streaming(program: Program, probe: Probe) -> tuple[Probe, str]:
    """The probe that fits a program, and what to say about it: shorter where weights stay in files.

    Each call of such a program reads, and dequantizes, every weight; so sequences are cut, and decoded for one step.
    """
    if program.work_file is None or not probe.sequences:
        return probe, ""
    longest = max(STREAMED_TOKENS, *map(len, probe.sequences))
    sequences = tuple(row[: max(2, len(row) * STREAMED_TOKENS // longest)] for row in probe.sequences)
    count = sum(map(len, sequences))
    note = f"the gate fed {count} tokens, not {sum(map(len, probe.sequences))}, and decoded 1 step: the weights stay in files"
    return replace(probe, sequences=sequences, steps=1), note


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


def run_probe(
    program: Program,
    probe: Probe,
    replay: type[Replay] = Replay,
    made: MadeWeights | None = None,
    products: KnownProducts | None = None,
) -> StageRun:
    """Run a stage on a probe; of a plain module each output is an entry of `logits`.

    Args:
        made: keeps what is made of codes for a run of another stage, too.
        products: keeps products for the next stage that is run.
    """
    if probe.sequences:
        return run_stage(
            program,
            probe.sequences,
            steps=probe.steps,
            replay=replay,
            cross=probe.cross,
            made=made,
            products=products,
        )
    return StageRun(run_module(program, probe.tensors, replay), [], role="output")

"""Graphs of the target onnx-cuda of tiny families, and a session's logits beside those of the program."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import torch
from chosen import chosen
from rewrites import stirred
from stages import sequences
from torch import Tensor

from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import ExportRequest, ExportResult, check_legal, obstacle
from optc.runtime.sessions.session import Session
from optc.targets.onnx_cuda import TARGET

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROWS = sequences(21, 9, 14, 5)
STEPS = 4


def written(name: str, directory: Path, layers: int = 2, **options: Any) -> tuple[Program, ExportResult]:
    """The last stage and what was exported of it."""
    made = chosen(TARGET.name, **options)
    program, context = stirred(name, DTYPES[made.dtype], layers), PassContext(obstacle=partial(obstacle, TARGET.legal))
    for step in TARGET.recipe(program.contract.kind, made):
        program = step.rewrite.run(program, context).program
    check_legal(program, TARGET)
    directory.mkdir(exist_ok=True)
    return program, TARGET.export(program, ExportRequest(directory=directory, options=made.own))


def compare(session: Session, program: Program) -> None:
    """Hold a session to the program, computed in float32: a ragged batch, steps, chunks of a row, and whole rows."""
    expected, rounding = bounds.of_half(program, ROWS)
    ragged = _steps(session, session.prefill([row[:-STEPS] for row in ROWS]))
    bounds.check(ragged, [row[-STEPS - 1 :] for row in expected], rounding, "ragged")
    chunks = []
    for row, logits in zip(ROWS, expected, strict=True):
        session.prefill([row[:2]])
        session.extend([row[2 : len(row) // 2]] if len(row) > 5 else [row[2:3]])
        start = len(row) // 2 if len(row) > 5 else 3
        found = torch.from_numpy(session.extend([row[start:]]))
        chunks.append((found, logits[-1:]))
    bounds.check([found for found, _ in chunks], [wanted for _, wanted in chunks], rounding, "chunks")
    whole = [torch.cat([torch.from_numpy(part) for part in session.score(row)]) for row in ROWS]
    bounds.check(whole, expected, rounding, "whole")


def _steps(session: Session, first: Any) -> list[Tensor]:
    """Logits [STEPS + 1, V] of each row: of its prompt's last token, then of STEPS tokens, all rows at once."""
    found = [first, *(session.decode([row[-STEPS + step] for row in ROWS]) for step in range(STEPS))]
    return list(torch.from_numpy(np.stack(found)).unbind(1))

"""Drives an exported folder in plain ONNX Runtime, without optc's sessions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from chosen import chosen
from torch import Tensor

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import ExportRequest, ExportResult, check_legal, obstacle
from optc.runtime.sessions.host_cpu import check_cpu
from optc.targets.onnx_cpu import TARGET

MODEL = "model.onnx"
CONTEXT = PassContext(obstacle=partial(obstacle, TARGET.legal))


def saturates() -> bool:
    try:
        check_cpu({"x86_flags_any": ["avx512_vnni", "avx_vnni"]})
    except TargetError:
        return True
    return False


EXACT_PRODUCTS = pytest.mark.skipif(
    saturates(), reason="this processor's product of unsigned and signed bytes saturates in ONNX Runtime"
)
"""Of tests whose artifacts need the processor that `check_cpu` asks for."""


def compiled(program: Program, directory: Path, **options: Any) -> tuple[Program, ExportResult]:
    """Run the target's recipe without the gate (numbers are compared here) and export."""
    made = chosen(TARGET.name, **options)
    for step in TARGET.recipe(program.contract.kind, made):
        program = step.rewrite.run(program, CONTEXT).program
    check_legal(program, TARGET)
    directory.mkdir(exist_ok=True)
    return program, TARGET.export(program, ExportRequest(directory=directory, options=made.own))


def exported(program: Program, directory: Path) -> ExportResult:
    """Export a program as it is."""
    return TARGET.export(program, ExportRequest(directory=directory))


def gated(program: Program, directory: Path, **options: Any) -> ExportResult:
    """As `compiled`, through the pipeline with its verification and gate."""
    made = chosen(TARGET.name, **options)
    steps = TARGET.recipe(program.contract.kind, made)
    result = Pipeline(steps).run(program, PipelineOptions(context=CONTEXT))
    check_legal(result.program, TARGET)
    directory.mkdir(exist_ok=True)
    return TARGET.export(result.program, ExportRequest(directory=directory, options=made.own))


def open_session(directory: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(str(directory / MODEL), options, providers=["CPUExecutionProvider"])


def run(session: Any, *inputs: Tensor) -> list[Tensor]:
    """Run on tensors in the order of the graph's inputs."""
    names = [item.name for item in [*session.get_inputs(), *session.get_overridable_initializers()]]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


class Decoder:
    """Caches of a batch that grow with every call (`past` is as long as the tokens held)."""

    def __init__(self, session: Any, contract: Contract, rows: int) -> None:
        self._session, self._contract = session, contract
        self._lengths = [0] * rows
        self._caches = [
            torch.zeros(
                (rows, *(0 if isinstance(dim, str) else dim for dim in spec.dims[1:])),
                dtype=getattr(torch, spec.dtype),
            )
            for spec in contract.inputs
            if spec.role in ("key_cache", "value_cache")
        ]

    def feed(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append tokens to each row (right-padded when unequal); their logits, per row [len, V]."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        self._lengths = [held + len(row) for held, row in zip(self._lengths, rows, strict=True)]
        total = torch.tensor(self._lengths)
        mask = (torch.arange(int(total.max())) < total[:, None]).long()
        past = max(held - len(row) for held, row in zip(self._lengths, rows, strict=True))
        caches = [cache[:, :, :past].contiguous() for cache in self._caches]
        every = [torch.arange(width, 0, -1)[None]] if self._contract.input_index("logits_from_end") is not None else []
        logits, *self._caches = run(self._session, ids, mask, *caches, *every)
        if every:
            return [part[width - len(row) :].float() for part, row in zip(logits, rows, strict=True)]
        return [part[: len(row)].float() for part, row in zip(logits, rows, strict=True)]


def schedules(session: Any, contract: Contract, rows: Sequence[Sequence[int]]) -> dict[str, list[Tensor]]:
    """Logits of every token, in several ways of feeding them: per schedule, one [len, V] per row."""
    ways: dict[str, list[Tensor]] = {"prefill": [], "chunks": [], "steps": []}
    for row in rows:
        for way, cuts in (
            ("prefill", [len(row)]),
            ("chunks", sorted({len(row) // 2, len(row) // 2 + 3, len(row)})),
            ("steps", list(range(1, len(row) + 1))),
        ):
            decoder, start, parts = Decoder(session, contract, 1), 0, []
            for end in cuts:
                parts += decoder.feed([row[start:end]])
                start = end
            ways[way].append(torch.cat(parts))
    ways["ragged"] = _ragged(session, contract, rows, steps=4)
    return ways


def _ragged(session: Any, contract: Contract, rows: Sequence[Sequence[int]], steps: int) -> list[Tensor]:
    """A right-padded prefill of unequal rows, then one token per row and step."""
    decoder = Decoder(session, contract, len(rows))
    parts = [[part] for part in decoder.feed([row[:-steps] for row in rows])]
    for step in range(-steps, 0):
        for store, part in zip(parts, decoder.feed([[row[step]] for row in rows]), strict=True):
            store.append(part)
    return [torch.cat(store) for store in parts]

"""Write a legalized decoder as model.pte, load it as its users will, and run it beside its Program."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optc.compiler.artifact.engines import EXECUTORCH
from optc.compiler.artifact.manifest import OpenedRecord
from optc.compiler.diagnostics import ArtifactError, GateError, InputError, os_errors
from optc.compiler.execution.drift import measure
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.ir.contract import CACHE_ROLES
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import TOLERANCE
from optc.compiler.pipeline.rerounding import widened
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.compiler.version import version_of
from optc.exporters.companions import copy_companions
from optc.exporters.executorch.forms import LINEAR
from optc.exporters.executorch.lower import Lowered, lower
from optc.exporters.executorch.trace import trace
from optc.exporters.options.executorch import ExecutorchOptions

MODEL = "model.pte"
CHUNK = 128
"""Most tokens of one call: memory for logits and scores is planned for as many."""
ROUNDED_TOLERANCE = 2e-2
"""Of logits, as a share of the largest, where activations are rounded: a last bit can move a code by one step."""
CAPACITY = 2048
"""Tokens of a sequence where neither the model nor --max-seq-len says it."""


def export_executorch(program: Program, request: ExportRequest) -> ExportResult:
    """Write the last stage for ExecuTorch: `model.pte` and the model's tokenizer and config.

    The program has what ExecuTorch's text runners ask for: forward(tokens int64 [1,S], start int64 [1]) -> logits
    [1,S,V], caches of fixed capacity inside, and methods get_max_seq_len, get_max_context_len, get_vocab_size,
    get_bos_id, get_eos_ids, use_kv_cache, enable_dynamic_shape. The file is loaded from the disk and compared with
    the program before anything is published.

    Raises:
        TargetError: operators without a kernel.
        GateError: the file computes other numbers than the program.
        InputError: --max-seq-len beyond the model's context.
        ResourceError, InputError: the disk is full or not writable.
    """
    program = program.in_memory()
    directory, contract = request.directory, program.contract
    capacity = _capacity(program, request.of(ExecutorchOptions).max_seq_len)
    chunk = min(CHUNK, capacity)
    lowered = lower(trace(program, capacity, chunk), _constants(program, capacity, chunk))
    with os_errors("writing the program", str(directory / MODEL)):
        (directory / MODEL).write_bytes(lowered.data)
    info = {
        "model": MODEL,
        "companions": copy_companions(request.source, directory),
        "context_length": capacity,
        "chunk": chunk,
        "vocab_size": contract.model.vocab_size,
        "eos_token_ids": list(contract.model.eos_token_ids),
        "delegates": lowered.delegates,
        "operators": list(lowered.operators),
    }
    opened = _check(program, directory / MODEL, lowered, capacity, chunk, _tolerance(program, request))
    sizes = _stored_bytes(program)
    return ExportResult(
        engine=EXECUTORCH,
        info=info,
        needs={"executorch": f">={version_of('executorch')}"},
        weight_bytes=sum(sizes.values()),
        tensor_bytes=sizes,
        opened=opened,
    )


def _tolerance(program: Program, request: ExportRequest) -> float:
    """Of the logits, as a share of the largest."""
    return widened(TOLERANCE[torch.float32], ROUNDED_TOLERANCE, program, request.rerounding, request.allowed)


def _stored_bytes(program: Program) -> dict[str, int]:
    """Bytes of each weight in the file: codes of 4 bits lie two to a byte, scales of groups are bfloat16."""
    sizes = {name: tensor.nbytes for name, tensor in program.weights()}
    for node in program.calls(LINEAR):
        if node.kwargs["group_size"]:
            for item in node.args[1:3]:
                name = program.weight_of(item)
                assert name is not None
                sizes[name] = program.weight(name).nbytes // 2
    return sizes


def _capacity(program: Program, wanted: int | None) -> int:
    context = program.contract.model.context_length
    if wanted is not None and context and wanted > context:
        raise InputError(
            f"--max-seq-len {wanted} is beyond the model's context of {context}",
            remedy=f"use at most {context}",
        )
    return wanted or min(context or CAPACITY, CAPACITY)


def _constants(program: Program, capacity: int, chunk: int) -> dict[str, Any]:
    """Names and meanings as in executorch/extension/llm/runner/constants.h."""
    model = program.contract.model
    constants: dict[str, Any] = {
        "get_max_seq_len": chunk,
        "get_max_context_len": capacity,
        "get_vocab_size": model.vocab_size,
        "get_n_layers": len(program.contract.layers),
        "get_eos_ids": list(model.eos_token_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }
    if model.bos_token_id is not None:
        constants["get_bos_id"] = model.bos_token_id
    return constants


def _check(program: Program, path: Path, lowered: Lowered, capacity: int, chunk: int, tolerance: float) -> OpenedRecord:
    """Compare logits and the caches' effect: a prompt, a chunk, and single tokens."""
    begin = time.perf_counter()
    from executorch.runtime import Runtime

    if path.read_bytes() != lowered.data:
        raise ArtifactError(
            "the written program differs from the one in memory", where=str(path), remedy="check the disk"
        )
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    logits: tuple[list[Tensor], list[Tensor]] = ([], [])
    caches = _caches(program, capacity)
    for ids, start in _calls(program, capacity, chunk):
        mask = torch.ones((1, start + ids.shape[1]), dtype=torch.long)
        with torch.no_grad():
            expected = program(ids, mask, *caches)
        expected = expected[0] if isinstance(expected, tuple | list) else expected
        found = method.execute([ids, torch.tensor([start])])[0]
        _compare(expected.double(), found.double(), tolerance, f"tokens {start} to {start + ids.shape[1] - 1}")
        logits[0].append(expected[0])
        logits[1].append(found[0])
    ours, theirs = (StageRun(rows, []) for rows in logits)
    drift = measure(ours, theirs)
    return OpenedRecord(
        opened=True,
        engine="executorch",
        version=version_of("executorch"),
        tokens=sum(map(len, logits[0])),
        max_abs_diff=drift.max_abs_diff,
        scale=drift.scale,
        relative=drift.relative,
        kl=drift.kl,
        top1=drift.top1,
        seconds=round(time.perf_counter() - begin, 3),
    )


def _compare(expected: Tensor, found: Tensor, tolerance: float, where: str) -> None:
    limit = tolerance * max(1.0, float(expected.abs().max()))
    same = expected.shape == found.shape
    gap = float((expected - found).abs().max()) if same else float("inf")
    if not gap <= limit:
        raise GateError(
            "the ExecuTorch program computes different numbers from the captured program",
            where=where,
            why=f"max abs difference {gap:.3g} > {limit:.3g}"
            if same
            else f"{list(found.shape)}, not {list(expected.shape)}",
            remedy="report this with the model's config",
        )


def _caches(program: Program, capacity: int) -> list[Tensor]:
    sizes: dict[str, int] = {"batch": 1, "capacity": capacity}
    return [
        torch.zeros(
            [item if isinstance(item, int) else sizes[item] for item in spec.dims], dtype=getattr(torch, spec.dtype)
        )
        for spec in program.contract.inputs
        if spec.role in CACHE_ROLES
    ]


def _calls(program: Program, capacity: int, chunk: int) -> Iterator[tuple[Tensor, int]]:
    """(tokens [1,S], where they start): sizes that fit the capacity."""
    generator = torch.Generator().manual_seed(0)
    start = 0
    for size in (5, 3, 1, 1):
        size = min(size, chunk, capacity - start)
        if size < 1:
            return
        yield torch.randint(0, program.contract.model.vocab_size, (1, size), generator=generator), start
        start += size

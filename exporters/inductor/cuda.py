"""Write a legalized Program for CUDA: graph, weights, tokenizer. Compiled code is a cache of the host's, not a file here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optc.compiler.artifact.engines import CUDA
from optc.compiler.artifact.manifest import OpenedRecord
from optc.compiler.diagnostics import GateError, TargetError
from optc.compiler.formats.safetensors_header import read_header
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.program import Program
from optc.compiler.ir.saved.programs import CONSTANTS_FILE, GRAPH_FILE, WEIGHTS_FILE
from optc.compiler.ir.text import format_program
from optc.compiler.target.target import ExportRequest, ExportResult, Predicate
from optc.exporters.companions import copy_companions
from optc.exporters.inductor.legal import AtenAndKernels

LEGAL: Mapping[Any, Predicate | None] = AtenAndKernels("cuda")

NEEDS: Mapping[str, Any] = {
    "torch": ">=2.11",
    "triton": ">=3.6",
    "compute_capabilities": ["80", "86", "87", "89", "90", "100", "103", "110", "120", "121"],
}
"""What a host must have: versions that the kernels were run with or later ones, and a GPU with bfloat16."""


def export_cuda(program: Program, request: ExportRequest) -> ExportResult:
    """Write the last stage as a saved program (see `compiler/ir/saved/programs`) beside the model's tokenizer and config.

    Raises:
        TargetError: passes of the user's own left out the KV cache.
        InputError, ResourceError: the folder cannot be written, or the disk is full.
    """
    check_paged(program)
    program.save(request.directory, examples=False)
    copy_companions(request.source, request.directory)
    sizes = {
        name: tensor.nbytes
        for file in (WEIGHTS_FILE, CONSTANTS_FILE)
        for name, tensor in read_header(request.directory / file).items()
    }
    return ExportResult(
        engine=CUDA,
        info={"graph": GRAPH_FILE, "weights": WEIGHTS_FILE, "constants": CONSTANTS_FILE},
        needs=dict(NEEDS),
        opened=_read_back(program, request.directory),
        weight_bytes=sum(sizes.values()),
        tensor_bytes=sizes,
    )


def check_paged(program: Program) -> None:
    """Refuse what no session runs.

    Raises:
        TargetError: the program is no decoder with a paged KV cache.
    """
    contract = program.contract
    if contract.kv_cache.kind != "paged":
        raise TargetError(
            "target 'inductor-cuda' runs decoders with a paged KV cache",
            why=f"after the passes the program is of kind '{contract.kind}', its KV cache '{contract.kv_cache.kind}'",
            remedy="leave --passes out, or name page-kv-cache among them",
        )


def _read_back(program: Program, directory: Path) -> OpenedRecord:
    """Read the saved program and hold it to the one that was saved: the same calls, and the same bits of weights.

    Raises:
        GateError: they differ.
    """
    begin = time.perf_counter()
    found = Program.load(directory)
    same = format_program(found) == format_program(program) and all(
        torch.equal(tensor.contiguous().view(torch.uint8), found.weight(name).contiguous().view(torch.uint8))
        for name, tensor in ((name, materialized(tensor.detach())) for name, tensor in program.weights())
    )
    if not same:
        raise GateError(
            "the written program differs from the one that was compiled",
            where=str(directory),
            remedy="nothing was published; report this with the model's config and --dump-ir",
        )
    return OpenedRecord(
        opened=True,
        why="read back: the same calls and the same weights as those that the gate ran; the kernels were not",
        engine="torch",
        version=str(torch.__version__),
        max_abs_diff=0.0,
        relative=0.0,
        seconds=round(time.perf_counter() - begin, 3),
    )

"""Load a package as its users will, through the runner beside it, and compare it with its Program."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optc.compiler.artifact.manifest import OpenedRecord
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.drift import comparable, measure
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.ir.contract import HELD_ROLES
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.paged_tree import CAUSAL
from optc.compiler.pipeline.gate import TOLERANCE
from optc.compiler.pipeline.pipeline import compute_dtype
from optc.compiler.pipeline.rerounding import widened
from optc.compiler.target.target import ExportRequest

Inputs = list[Tensor]
ROUNDED_TOLERANCE = 2e-2
"""Where activations are rounded, a difference in the last bit of one can move its code by one step."""


_OTHER_TOKENS = 0.25
"""Share of the tokens of an output that may differ."""


def check_package(
    program: Program, info: Mapping[str, Any], needs: Mapping[str, Any], request: ExportRequest
) -> OpenedRecord:
    """Run package and Program on the same inputs, a prompt and then single tokens.

    Returns:
        How far the first outputs of all calls were apart.

    Raises:
        GateError: an output or a cache differs by more than rounding.
    """
    begin = time.perf_counter()
    first: tuple[list[Tensor], list[Tensor]] = ([], [])
    package = _runner(request.directory / info["runner"]).Package(request.directory, info, needs)
    caches, tolerance = [_caches(program), _caches(program)], _tolerance(program, request)
    for call, inputs in enumerate(_calls(program)):
        with torch.no_grad():
            expected = program(*inputs, *caches[0])
        found = package(*inputs, *caches[1])
        expected = list(expected) if isinstance(expected, tuple | list) else [expected]
        written = list(zip(*caches, strict=True)) if program.contract.kv_cache.in_place else []
        for index, (old, new) in enumerate([*zip(expected, found, strict=True), *written]):
            compare_outputs(old, new, tolerance, f"call {call}, " + _name(program, index))
        first[0].append(expected[0])
        first[1].append(found[0])
    ours, theirs = (StageRun(outputs, [], role="output") for outputs in first)
    drift = measure(ours, theirs)
    return OpenedRecord(
        opened=True,
        engine="aotinductor",
        version=str(torch.__version__),
        tokens=_tokens(program),
        max_abs_diff=drift.max_abs_diff,
        scale=drift.scale,
        relative=drift.relative,
        seconds=round(time.perf_counter() - begin, 3),
    )


def _tokens(program: Program) -> int:
    return 0 if program.contract.kind == "module" else 2 * _length(program)


def _runner(path: Path) -> Any:
    """The runner's module, from the very file that is shipped; of equal files the first, which has its operators loaded."""
    source = path.read_bytes()
    if source not in _runners:
        _runners[source] = _import(path)
    return _runners[source]


_runners: dict[bytes, Any] = {}


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("_optc_shipped_runner", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def compare_outputs(old: Tensor, new: Tensor, tolerance: float, where: str) -> None:
    """Hold an output of compiled code to the program's.

    Args:
        tolerance: largest difference, as a share of the largest magnitude, at least 1.

    Raises:
        GateError: they differ by more.
    """
    if not old.is_floating_point() and old.shape == new.shape:
        _compare_tokens(old, new, where)
        return
    same = old.shape == new.shape
    if same:
        old, new = comparable(old, new)
    old, new = old.double(), new.double()
    limit = tolerance * max(1.0, float(old.abs().max()) if old.numel() else 1.0)
    gap = float((old - new).abs().max()) if same and old.numel() else 0.0
    if not same or not gap <= limit:
        raise GateError(
            "the compiled package computes different numbers from the captured program",
            where=where,
            why=f"max abs difference {gap:.3g} > {limit:.3g}" if same else f"{list(new.shape)}, not {list(old.shape)}",
            remedy="report this with the model's config: AOTInductor miscompiled it",
        )


def _compare_tokens(old: Tensor, new: Tensor, where: str) -> None:
    """Guesses of tokens are the places of largest logits: rounding may choose another one of two that are as large."""
    differ = int((old != new).sum())
    if differ > _OTHER_TOKENS * old.numel():
        raise GateError(
            "the compiled package guesses other tokens than the captured program",
            where=where,
            why=f"{differ} of {old.numel()} differ",
            remedy="report this with the model's config: AOTInductor miscompiled it",
        )


def _tolerance(program: Program, request: ExportRequest) -> float:
    """Of the outputs, as a share of their largest magnitude."""
    own = TOLERANCE[compute_dtype(program)]
    return widened(own, ROUNDED_TOLERANCE, program, request.rerounding, request.allowed)


def _name(program: Program, index: int) -> str:
    contract = program.contract
    names = [spec.name for spec in contract.outputs] + [
        spec.name for spec in contract.inputs if spec.role in HELD_ROLES
    ]
    return names[index]


_SIZES = {"batch": 2, "capacity": 24, "past": 0, "num_blocks": 16}


def _caches(program: Program) -> Inputs:
    shapes = [(spec.dims, spec.dtype) for spec in program.contract.inputs if spec.role in HELD_ROLES]
    return [
        torch.zeros([size if isinstance(size, int) else _SIZES[size] for size in dims], dtype=getattr(torch, dtype))
        for dims, dtype in shapes
    ]


def _calls(program: Program) -> Iterator[Inputs]:
    """Inputs before the caches: prefill of two rows, then one token for each (one call without a cache)."""
    contract = program.contract
    if contract.kind == "module":
        yield _module_inputs(program)
        return
    length = _length(program)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, contract.model.vocab_size, (2, length), generator=generator)
    if contract.kv_cache.kind == "none":
        made = {
            "input_ids": ids,
            "position_ids": torch.arange(length).repeat(2, 1),
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        yield [made[spec.role] for spec in contract.inputs]
        return
    step = _linear if contract.kv_cache.kind == "linear" else _paged
    if length > 1:
        yield step(program, ids[:, :-1], 0)
    yield step(program, ids[:, -1:], length - 1)


def _length(program: Program) -> int:
    return min(5, program.contract.model.context_length or 5)


def _linear(program: Program, ids: Tensor, past: int) -> Inputs:
    return [ids.contiguous(), torch.ones((2, past + ids.shape[1]), dtype=torch.long)]


def _paged(program: Program, ids: Tensor, past: int) -> Inputs:
    """Rows laid end to end, with blocks in falling order; where the program takes trees, the first row is one of leaves."""
    size, count = program.contract.kv_cache.block_size, ids.shape[1]
    assert past + count <= size * _SIZES["num_blocks"] // 2, "a few tokens fit a few blocks"
    order = torch.arange(_SIZES["num_blocks"] - 1, -1, -1, dtype=torch.int32)
    tables = order.view(2, -1)
    position = torch.arange(past, past + count).repeat(2)
    row = torch.arange(2).repeat_interleave(count)
    slots = tables[row, position // size].long() * size + position % size
    lengths = torch.full((2,), past + count, dtype=torch.int32)
    starts = torch.tensor([0, count, 2 * count], dtype=torch.int32)
    generator = torch.Generator().manual_seed(past)
    states = [
        torch.randn((2 * count, int(spec.dims[1])), generator=generator).to(getattr(torch, spec.dtype))
        for spec in program.contract.inputs
        if spec.role in ("base_states", "own_states")
    ]
    leaves = 1 | 1 << torch.arange(count)
    takes = program.contract.input_index("tree") is not None
    tree = [torch.cat([leaves, torch.full_like(leaves, CAUSAL)])] if takes else []
    return [ids.reshape(-1).contiguous(), position, slots, tables, lengths, starts, *tree, *states]


def _module_inputs(program: Program) -> Inputs:
    """The example inputs of a module, or ones and random numbers of its shapes."""
    if program.exported.example_inputs is not None:
        return [tensor.contiguous() for tensor in program.exported.example_inputs[0]]
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for spec in program.contract.inputs:
        shape = [size if isinstance(size, int) else 3 for size in spec.dims]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        random = torch.randn(shape, generator=generator).to(dtype)
        inputs.append(random if dtype.is_floating_point else torch.ones(shape, dtype=dtype))
    return inputs

"""The file that was written is opened in its engine and compared with the last stage, before it is published."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optc.compiler.artifact.engines import Engine
from optc.compiler.artifact.manifest import Manifest, OpenedRecord
from optc.compiler.diagnostics import GateError, OptcError, TargetError
from optc.compiler.execution.drift import Drift, measure
from optc.compiler.execution.probe import random_probe
from optc.compiler.execution.stage_driver import StageRun, run_module, run_stage, written_inputs
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.pipeline import compute_dtype, default_probe, example_inputs
from optc.compiler.pipeline.rerounding import rerounding, widened
from optc.compiler.version import version_of
from optc.runtime.sessions.host_cpu import check_cpu

_LENGTHS = (9, 5)
"""Tokens of the two sequences: a ragged prefill, then one decode step."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROUNDED_TOLERANCE = 3e-2  # a sum in another order moves a code of an activation to the next


def open_written(
    directory: Path,
    manifest: Manifest,
    program: Program,
    engine: Engine,
    tokens: Sequence[int],
    allowed: float = 0.0,
    graphs: Sequence[tuple[Mapping[str, Any], Program]] = (),
) -> OpenedRecord:
    """Run what was written beside the last stage: a prefill of a few tokens and one step of decoding.

    Args:
        directory: the artifact before it is published.
        program: the last stage. Where it rounds activations, the limit follows what that cost (`manifest.passes`).
        tokens: encoded text; random tokens are taken where there is too little.
        allowed: the relative error that the user allows the whole compile; it widens the engine's own tolerance.
        graphs: where there are several files, the info of each and the program that it is to compute; `program` is one.

    Raises:
        GateError: the engine cannot open the file, or it computes different numbers from the last stage.
    """
    begin = time.perf_counter()
    own = _TOLERANCE[compute_dtype(program)]
    limit = widened(own, _ROUNDED_TOLERANCE, program, rerounding(manifest.passes), allowed)
    if engine.runner is None:
        return OpenedRecord(opened=False, why=f"optc has no way to open files of {engine.name} here")
    try:
        check_cpu(manifest.needs)
    except TargetError as error:  # another processor may run it
        return OpenedRecord(opened=False, why=f"{error.what}: {error.why}")
    count, drifts, instead = 0, [], engine.opens_instead
    for info, stage in graphs or [(manifest.engine_info, program)]:
        try:
            place = (program_device(stage),) if engine.follows_program else ()
            runner = engine.open_runner(directory, manifest.with_program(engine_info=dict(info)), *place)
        except TargetError as error:
            if isinstance(error.__cause__, ImportError):
                return OpenedRecord(opened=False, why=error.what)
            raise _unopened(engine, error) from error
        except OptcError as error:
            raise _unopened(engine, error) from error
        if isinstance(runner, str):
            return OpenedRecord(opened=False, why=runner)
        instead = getattr(runner, "opens_instead", "") or instead
        drift, fed = _compared(stage, runner, engine, tokens)
        drifts.append(drift)
        count += fed
    drift = max(drifts, key=lambda item: item.relative)
    record = OpenedRecord(
        opened=True,
        why=instead,
        engine=engine.package or engine.name,
        version=version_of(engine.package) if engine.package else "",
        tokens=count,
        max_abs_diff=drift.max_abs_diff,
        scale=drift.scale,
        relative=drift.relative,
        limit=limit if math.isfinite(limit) else None,
        kl=drift.kl,
        top1=drift.top1,
        seconds=round(time.perf_counter() - begin, 3),
    )
    if not drift.relative <= limit:
        raise GateError(
            f"the written file computes different numbers from the last stage in {record.engine} {record.version}".rstrip(),
            where=str(manifest.engine_info.get("model", "")) or manifest.target,
            why=f"relative difference {drift.relative:.3g} > {limit:.3g}, max abs difference {drift.max_abs_diff:.3g} on "
            f"outputs of up to {drift.scale:.3g}",
            remedy="nothing was published; report this with the model's config and --dump-ir",
        )
    return record


def _unopened(engine: Engine, error: OptcError) -> GateError:
    return GateError(
        f"the written file cannot be opened by {engine.name}",
        where=error.where,
        why=f"{error.what}: {error.why}" if error.why else error.what,
        remedy="nothing was published; report this with the model's config",
    )


def _compared(program: Program, runner: Callable[..., Any], engine: Engine, tokens: Sequence[int]) -> tuple[Drift, int]:
    """(difference of the engine from the last stage, tokens fed)."""
    try:
        first = program.contract.input_index("encoder_states") is not None
        if program.contract.kind == "module" or first:
            inputs = example_inputs(program, 0) if first else default_probe(program, 0).tensors
            outputs = run_module(program, inputs)
            ours = StageRun(outputs[: len(outputs) - len(written_inputs(program))], [], role="output")
            found = StageRun([item for item in runner(*inputs) if isinstance(item, Tensor)], [], role="output")
            return measure(ours, found), 0
        sequences = _sequences(program, tokens)
        ours, found = (run_stage(program, sequences, chunk=0, steps=1, engine=run) for run in (None, runner))
    except (RuntimeError, ValueError, TypeError, torch.OutOfMemoryError) as error:
        raise GateError(
            f"the written file does not run in {engine.name}",
            where=engine.name,
            why=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            remedy="nothing was published; report this with the model's config",
        ) from error
    return measure(ours, found), sum(map(len, sequences))


def _sequences(program: Program, tokens: Sequence[int]) -> list[list[int]]:
    model, capacity = program.contract.model, program.contract.kv_cache.capacity
    longest = min(_LENGTHS[0], model.context_length or _LENGTHS[0], capacity or _LENGTHS[0])
    if program.contract.cross is not None:  # answers of one length
        row = random_probe(model.vocab_size, longest=2 * longest).sequences[0]
        return [list(row[:longest]), list(row[longest:])]
    if len(tokens) < sum(_LENGTHS):
        return [list(row[:longest]) for row in random_probe(model.vocab_size, longest=longest).sequences[:2]]
    return [
        list(tokens[: min(longest, _LENGTHS[0])]),
        list(tokens[_LENGTHS[0] : _LENGTHS[0] + min(longest, _LENGTHS[1])]),
    ]

"""The artifact of a compile: what was exported, what the manifest says of it, and that it is what the passes made."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch

from optc.capturing import Captured
from optc.compiler.analysis.weight_parts import weight_parts
from optc.compiler.artifact import folder as artifact
from optc.compiler.artifact.early_hashes import EarlyHashes
from optc.compiler.artifact.manifest import Manifest, ProgramEntry, Role, Source
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.diagnostics import os_errors
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.devices import has_room, program_device, to_device
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import CheckpointInfo, config_digest, weights_digest
from optc.compiler.model_folder.source_hash import SourceHash
from optc.compiler.pipeline.pipeline import PipelineResult, Stage, compute_dtype
from optc.compiler.pipeline.quantization_summary import quantized_linears, summarize
from optc.compiler.pipeline.rerounding import rerounding
from optc.compiler.pipeline.written_sizes import source_bytes, written_sizes
from optc.compiler.target.target import ExportRequest, ExportResult, Target
from optc.compiler.version import version
from optc.drafted import FOLDER, Compiled, both_needs, drafting_records, export_draft
from optc.encoder_decoder import both_contracts, both_parts
from optc.exporters.reports.report import write_report
from optc.opening import open_written
from optc.request import given_limits
from optc.resolving import Resolved


@dataclass(frozen=True)
class Programs:
    """What an artifact is made of.

    Attributes:
        encoded: of the encoder that the model reads, None without one.
        drafted: a smaller model that drafts for it, None without one.
    """

    model: Compiled
    encoded: PipelineResult | None = None
    drafted: Compiled | None = None

    @property
    def stages(self) -> Iterator[tuple[str, Stage]]:
        """(folder, stage) of each."""
        drafted = None if self.drafted is None else self.drafted.result
        for place, result in (("ir", self.model.result), ("ir/encoder", self.encoded), (f"ir/{FOLDER}", drafted)):
            yield from ((place, stage) for stage in (() if result is None else result.stages))


def write_artifact(
    folder: Path,
    resolved: Resolved,
    programs: Programs,
    command: str,
    seconds: dict[str, float],
    begin: float,
    weights: SourceHash,
) -> Manifest:
    """Export into a temporary sibling, describe it, read it back, publish it.

    Args:
        weights: the hash of the files that the model came from.
        seconds: gets "export" and "total", counted from `begin`.

    Raises:
        OptcError: as the target's exporter; GateError: what was written computes other numbers.
    """
    captured, result = programs.model.captured, programs.model.result
    with artifact.write_folder(folder, force=resolved.request.run.force) as directory:
        start = time.perf_counter()
        request = ExportRequest(
            directory=directory,
            options=resolved.options.own,
            source=captured.info.path if captured.info else None,
            rerounding=rerounding(result.records),
            allowed=resolved.request.gate.max_relative_error or 0.0,
            trust_remote_code=resolved.request.what.trust_remote_code,
        )
        exported, draft = _export(resolved.target, programs, request)
        seconds["export"] = time.perf_counter() - start
        with os_errors("writing the stages' text", str(directory)):
            for place, stage in programs.stages:
                (directory / place).mkdir(exist_ok=True)
                (directory / place / stage.file_name).write_text(stage.text)
        with EarlyHashes(directory) as early:
            manifest = _manifest(resolved, programs, exported, command, seconds, weights)
            opened = exported.opened or open_written(
                directory,
                manifest,
                _where_it_opens(captured, result.program),
                exported.engine,
                captured.tokens,
                request.allowed,
                exported.graphs,
            )
            if draft is not None:
                assert programs.drafted is not None
                manifest = _with_draft(manifest, programs.drafted, draft)
            seconds["total"] = time.perf_counter() - begin
            rounded = {key: round(value, 3) for key, value in seconds.items()}
            manifest = msgspec.structs.replace(manifest, opened=opened, seconds=rounded)
            write_report(directory, manifest)
            return artifact.finish(directory, manifest, early=early)


def _where_it_opens(captured: Captured, program: Program) -> Program:
    """The last stage on its device, or on the CPU where that has no room for what was written and for what the stage makes of
    its codes beside it."""
    size = 0 if captured.info is None else captured.info.weight_bytes
    return program if has_room(program_device(program), 2 * size) else to_device(program, torch.device("cpu"))


def _export(target: Target, programs: Programs, request: ExportRequest) -> tuple[ExportResult, ExportResult | None]:
    """What was written of the model, and of the one that drafts."""
    program, encoded, drafted = programs.model.result.program, programs.encoded, programs.drafted
    if encoded is None:
        exported = target.export(program, request)
    else:
        assert target.export_encoder_decoder is not None, "checked before"
        exported = target.export_encoder_decoder(encoded.program, program, request)
    return exported, None if drafted is None else export_draft(target, drafted.result, request)


def _manifest(
    resolved: Resolved,
    parts: Programs,
    exported: ExportResult,
    command: str,
    seconds: dict[str, float],
    weights: SourceHash,
) -> Manifest:
    """What the manifest says without a model that drafts."""
    target, captured, result, encoded = resolved.target, parts.model.captured, parts.model.result, parts.encoded
    program, info = result.program, captured.info
    programs: dict[Role, ProgramEntry] = {"model": ProgramEntry(contract=program.contract, engine_info=exported.info)}
    records, contract = result.records, program.contract
    if encoded is not None:
        assert exported.encoder is not None, "the exporter wrote two programs"
        programs["encoder"] = exported.encoder
        records = (*encoded.records, *records)
        contract = both_contracts(encoded.program.contract, contract)
    return Manifest(
        optc_version=version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        target=target.name,
        engine=exported.engine.name,
        device=target.device if exported.engine.device == "target" else exported.engine.device,
        programs=programs,
        needs={"machine": platform.machine(), **exported.needs},
        dtype=str(compute_dtype(program)).removeprefix("torch."),
        source=_source(info, weights.result())
        if info
        else Source(path="", config_sha256="", weights_sha256="", parameters=0, dtype=""),
        capture=captured.proof,
        limits=given_limits(resolved.request.gate),
        passes=records,
        weight_bytes=exported.weight_bytes,
        sizes=_sizes(captured, contract, exported),
        quantization=summarize(contract, quantized_linears(records), exported.tensor_bytes),
        seconds=seconds,
    )


def _sizes(captured: Captured, contract: Contract, exported: ExportResult) -> Sizes:
    """Of the weights of a model as captured, encoder and decoder together, and as they were written."""
    read = [item for item in (captured.encoder, captured.program) if item is not None]
    parts = functools.reduce(both_parts, map(weight_parts, read))
    info = captured.info
    return written_sizes(
        parts,
        contract,
        exported.tensor_bytes,
        exported.weight_bytes,
        None if info is None else info.weight_bytes,
        None if info is None else source_bytes(parts, read, info),
    )


def _with_draft(manifest: Manifest, drafted: Compiled, exported: ExportResult) -> Manifest:
    """With the program of a smaller model that drafts."""
    info, contract = drafted.captured.info, drafted.result.program.contract
    assert info is not None, "it is captured from a folder"
    entry = ProgramEntry(
        contract=contract,
        engine_info=exported.info,
        source=_source(info, weights_digest(info)),
        capture=drafted.captured.proof,
        opened=exported.opened,
    )
    sizes = None if manifest.sizes is None else manifest.sizes.with_draft(_sizes(drafted.captured, contract, exported))
    return msgspec.structs.replace(
        manifest,
        programs={**manifest.programs, "draft": entry},
        needs=both_needs(manifest.needs, exported.needs),
        passes=(*manifest.passes, *drafting_records(drafted.result)),
        weight_bytes=manifest.weight_bytes + exported.weight_bytes,
        sizes=sizes,
    )


def _source(info: CheckpointInfo, weights_sha256: str) -> Source:
    parameters = sum(int(torch.Size(tensor.shape).numel()) for tensor in info.tensors.values())
    return Source(
        path=str(info.path.resolve()),
        config_sha256=config_digest(info),
        weights_sha256=weights_sha256,
        parameters=parameters,
        dtype=str(info.config.get("dtype") or info.config.get("torch_dtype") or ""),
    )

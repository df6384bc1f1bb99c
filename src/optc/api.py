"""The public Python API: capture, compile, load."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from optc.calibrating import make_calibration
from optc.capturing import Captured, Model, capture, capture_for_compile, stored_dtype
from optc.compiler.artifact import folder as artifact
from optc.compiler.artifact.drift_table import drift_table, pass_title
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.calibration.examples import Examples
from optc.compiler.calibration.sequences import Calibration
from optc.compiler.diagnostics import InputError, TargetError, UsageError
from optc.compiler.execution.probe import Probe, text_probe
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.devices import to_device
from optc.compiler.ir.saved.exported_archive import is_exported_file
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.model_folder.medusa import check_base
from optc.compiler.model_folder.quantized import refuse_quantizing_again
from optc.compiler.model_folder.source_hash import SourceHash
from optc.compiler.notebook import html_table
from optc.compiler.pipeline.gate import Limits
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions, PipelineResult, default_probe
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.settings.fields import check_type
from optc.compiler.target.target import check_context, check_legal, obstacle
from optc.drafted import Compiled, DraftFolder, capture_draft, check_pair, for_draft, pass_count
from optc.encoder_decoder import RECIPE, answer_probe, check_encoder_decoder
from optc.equivalent_command import command_of
from optc.exporters.hf.drafts import check_carried
from optc.exporters.options.hf import DraftingServer
from optc.hub import local_model
from optc.progress import reporting
from optc.request import LIMITS, Request, from_python
from optc.resolving import Resolved, recipe_steps, resolve, settled
from optc.saved_recipes import check_recipe, write_recipe
from optc.writing import Programs, write_artifact

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class CompileResult:
    """What `compile` wrote: the artifact's folder and its manifest."""

    artifact: Path
    manifest: Manifest

    def __repr__(self) -> str:
        """A line for each of the folder, its sizes and what the passes cost in all."""
        manifest = self.manifest
        lines = [f"{self.artifact}: {manifest.target}, {manifest.seconds['total']:.1f} s"]
        lines += [] if manifest.sizes is None else [f"weights {manifest.sizes}"]
        total = next((row.since_capture for row in reversed(manifest.passes) if row.since_capture is not None), None)
        if total is not None:
            measures = {"KL": total.kl, "top-1": total.top1_agreement, "relative error": total.relative_error}
            lines.append(
                "since the capture: " + ", ".join(f"{k} {v:.3g}" for k, v in measures.items() if v is not None)
            )
        return "CompileResult(" + "\n  ".join(lines) + ")"

    def _repr_html_(self) -> str:
        """The folder with its sizes, and a row for each pass."""
        manifest = self.manifest
        titles, cells = drift_table(msgspec.to_builtins(manifest.passes))
        rows = [
            (pass_title(row.name, row.program), f"{row.matched} of {row.candidates}", *drift)
            for row, drift in zip(manifest.passes, cells, strict=True)
        ]
        sizes = "" if manifest.sizes is None else f"; weights {manifest.sizes}"
        return html_table(f"{self.artifact}: {manifest.target}{sizes}", ("pass", "matched", *titles), rows)

    def to_dict(self) -> dict[str, Any]:
        """The object that `optc compile --json` prints."""
        rows = [
            {
                "name": row.name,
                "program": row.program,
                "matched": row.matched,
                "candidates": row.candidates,
                "seconds": row.seconds,
                "drift": msgspec.to_builtins(row.drift),
                "since_capture": msgspec.to_builtins(row.since_capture),
                "notes": list(row.notes),
            }
            for row in self.manifest.passes
        ]
        return {
            "artifact": str(self.artifact),
            "target": self.manifest.target,
            "seconds": self.manifest.seconds["total"],
            "weight_bytes": self.manifest.weight_bytes,
            "sizes": None if self.manifest.sizes is None else self.manifest.sizes.to_dict(),
            "quantization": self.manifest.quantization,
            "capture": msgspec.to_builtins(self.manifest.capture),
            "opened": msgspec.to_builtins(self.manifest.opened),
            "limits": self.manifest.limits,
            "passes": rows,
            "notes": list(self.manifest.engine_info.get("notes", ())),
        }


def compile(
    model: Model,
    *,
    target: str | None = None,
    output: str | Path | None = None,
    quant: str | None = None,
    example_inputs: Sequence[torch.Tensor] | None = None,
    request: Request | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> CompileResult:
    """Compile a model for a target and write the artifact.

    Args:
        model: model folder, .pt2 file of `torch.export.save`, transformers model, nn.Module (with `example_inputs`),
            ExportedProgram or Program.
        target: target name (`optc targets`).
        output: the artifact's folder; must not exist unless `force=True`.
        quant: quantization method, or None.
        request: everything but the model in one object, in place of the other arguments.
        progress: True shows a bar (in a notebook too; without a terminal lines on stderr); a function is told
            (finished passes, what goes on).
        options: keys of a request in snake case (bits=, group_size=, force=, max_seq_len=, ...); `calibration` is a
            path or token ids as int64 [samples, length], `passes` may hold Pass objects.

    Raises:
        OptcError: of the class that fits; see `optc.compiler.diagnostics` for exit codes.
    """
    begin = time.perf_counter()
    request = _request(request, target, {"output": output, "quant": quant, **options})
    named, model = model, local_model(model)
    resolved = resolve_for(model, request)
    if request.run.output is None:
        raise UsageError("no output given", remedy="output='out/model', or -o OUT")
    artifact.check_output(request.run.output, request.run.force)
    if request.run.save_recipe is not None:
        check_recipe(request.run.save_recipe, named, request)
    title, steps = f"compiling for {resolved.target.name}", lambda: pass_count(resolved) + 1
    with reporting(progress, title, steps) as told:
        manifest = _compile(model, example_inputs, resolved, command_of(named, request), told, begin)
    if request.run.save_recipe is not None:
        write_recipe(request.run.save_recipe, named, request)
    return CompileResult(request.run.output, manifest)


def _compile(
    model: Model,
    example_inputs: Sequence[torch.Tensor] | None,
    resolved: Resolved,
    command: str,
    progress: Progress | None,
    begin: float,
) -> Manifest:
    """Capture, run the recipe and write the artifact; what was published."""
    folder = DraftFolder.of(model, resolved)
    captured = capture_resolved(model, example_inputs, resolved)
    with SourceHash(captured.info) as weights:
        return _compile_captured(captured, folder, resolved, command, progress, begin, weights)


def _compile_captured(
    captured: Captured,
    folder: DraftFolder | None,
    resolved: Resolved,
    command: str,
    progress: Progress | None,
    begin: float,
    weights: SourceHash,
) -> Manifest:
    """`_compile` behind the capture, while the source's weights are hashed."""
    drafting = None if folder is None else capture_draft(folder, for_draft(resolved), _work_folder(resolved))
    if captured.program.contract.draft is not None and resolved.options.kv_cache != "paged":
        raise UsageError(
            "a draft model needs a paged KV cache",
            where=resolved.target.name,
            why="it forgets rejected tokens of each request by itself",
            remedy="compile it with --target inductor-cpu --kv-cache paged",
        )
    check_context(_capacity(resolved), captured.program.contract.model.context_length)
    seconds = {"capture": time.perf_counter() - begin}
    encoded, probe = _encoder_passes(captured, resolved, progress, seconds)
    kind = None if encoded is None else RECIPE
    result = run_passes(captured, resolved, progress, seconds, kind, probe)
    result = result if resolved.target.exports_anywhere else on_cpu(result)
    drafted = None
    if drafting is not None:
        found = on_cpu(run_passes(drafting, for_draft(resolved), progress, seconds))
        check_pair(result.program, found.program)
        drafted = Compiled(drafting, found)
    if progress:
        progress(len(result.records), "exporting")
    output = resolved.request.run.output
    assert output is not None, "checked before"
    programs = Programs(Compiled(captured, result), encoded, drafted)
    return write_artifact(output, resolved, programs, command, seconds, begin, weights)


def resolve_for(model: Model, request: Request) -> Resolved:
    """`resolve`, with the type of the model's weights where the target asks for it.

    Raises:
        OptcError: as `resolve`, and as `capture` of a folder that cannot be read.
    """
    resolved = resolve(request)
    if not resolved.target.keeps_dtype or request.what.dtype is not None:
        return resolved
    return resolve(request, stored_dtype(model, request.what.trust_remote_code))


def _request(request: Request | None, target: str | None, values: dict[str, Any]) -> Request:
    """The request that was given, whole or in parts, not both."""
    if request is None:
        if target is None:
            raise UsageError("no target given", remedy="target='onnx-cpu' (see optc targets)")
        return from_python(target, **values)
    if target is not None or any(value is not None for value in values.values()):
        raise UsageError("a request was given together with options", remedy="put them into the request")
    check_type("request", request, Request, "an optc.request.Request, or the arguments one by one")
    return request


def capture_resolved(model: Model, example_inputs: Sequence[torch.Tensor] | None, resolved: Resolved) -> Captured:
    """The model, captured and proved as a request asks for it.

    Raises:
        OptcError: as `capture`; UsageError where quantized weights would be quantized again; InputError for heads that
            were trained for another model.
    """
    request = resolved.request
    if isinstance(model, str | Path) and is_exported_file(Path(model)):
        _refuse_dtype(model, resolved)
    elif resolved.options.quantization is not None and isinstance(model, str | Path):
        refuse_quantizing_again(Path(model))
    heads = resolved.options.medusa
    if heads is not None and isinstance(model, str | Path):
        check_base(heads, check_folder(Path(model), trust_remote_code=request.what.trust_remote_code))
    if isinstance(resolved.options.own, DraftingServer):
        folder = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
        check_carried(resolved.options.own, folder)
    return capture_for_compile(
        model,
        example_inputs,
        dtype=resolved.options.dtype,
        trust_remote_code=request.what.trust_remote_code,
        text=request.gate.text,
        work_folder=_work_folder(resolved),
        device=resolved.device,
        base=request.drafting.base,
        pooling=request.what.pooling,
    )


def _refuse_dtype(model: Model, resolved: Resolved) -> None:
    """An exported program keeps its types.

    Raises:
        UsageError: another one was asked for.
    """
    asked = resolved.request.what.dtype
    if asked is not None and stored_dtype(model, False) != asked:
        raise UsageError(
            f"--dtype {asked} has no effect on an exported program",
            where=str(model),
            remedy="leave it out, or export the module in that type",
        )


def on_cpu(result: PipelineResult) -> PipelineResult:
    """With the program where exporters write from."""
    return replace(result, program=to_device(result.program, torch.device("cpu")))


def _encoder_passes(
    captured: Captured, resolved: Resolved, progress: Progress | None, seconds: dict[str, float]
) -> tuple[PipelineResult | None, Probe | None]:
    """The recipe on the encoder that a program reads, and what the gate then feeds the program; None without one.

    Raises:
        OptcError: as `run_passes`; TargetError: what is not done with encoder-decoder models.
    """
    encoder = captured.encoder
    if encoder is None:
        return None, None
    check_encoder_decoder(resolved, recipe_steps(resolved, RECIPE))
    asked = resolved.request
    folder = asked.run.dump_ir
    run = asked.run if folder is None else msgspec.structs.replace(asked.run, dump_ir=folder / "encoder")
    own = replace(captured, program=encoder, encoder=None)
    given = _text_probe(own, resolved) or default_probe(encoder, asked.gate.seed)
    resolved = replace(resolved, request=msgspec.structs.replace(asked, run=run))
    result = run_passes(own, resolved, progress, seconds, RECIPE, given)
    records = tuple(msgspec.structs.replace(record, program="encoder") for record in result.records)
    return on_cpu(replace(result, records=records)), answer_probe(encoder, captured.program, given)


def run_passes(
    captured: Captured,
    resolved: Resolved,
    progress: Progress | None,
    seconds: dict[str, float],
    kind: str | None = None,
    probe: Probe | None = None,
) -> PipelineResult:
    """The recipe on the device that was asked for; what the target cannot run is refused.

    Args:
        kind: of the recipe; None takes the program's own.
        probe: what the gate feeds; None takes text, or random tokens.
        seconds: gets the times of "move" and "passes", added to what is there.
    """
    begin = time.perf_counter()
    program = to_device(captured.program, resolved.device)
    moved = time.perf_counter()
    seconds["move"] = seconds.get("move", 0.0) + moved - begin
    resolved = settled(resolved, program)
    steps = recipe_steps(resolved, kind or program.contract.kind)
    calibration = None
    if any(step.rewrite.calibrated for step in steps):
        calibration = make_calibration(program, captured.info, resolved.request)
    options = _pipeline_options(captured, resolved, calibration, progress, probe)
    result = Pipeline(steps).run(program, options)
    del program  # its weights may be many
    check_legal(result.program, resolved.target)
    seconds["passes"] = seconds.get("passes", 0.0) + time.perf_counter() - moved
    return result


def _capacity(resolved: Resolved) -> int | None:
    """Tokens of a cache that were asked for, of a target that has the option."""
    asked: int | None = getattr(resolved.options.own, "max_seq_len", None)
    return asked


def _work_folder(resolved: Resolved) -> Path | None:
    """Where large tensors wait while a large model is compiled: on the disk that the artifact goes to."""
    output = resolved.request.run.output
    return None if output is None else next(parent for parent in output.resolve().parents if parent.is_dir())


def _pipeline_options(
    captured: Captured,
    resolved: Resolved,
    calibration: Calibration | None,
    progress: Progress | None,
    probe: Probe | None,
) -> PipelineOptions:
    run, limits = resolved.request.run, resolved.request.gate
    return PipelineOptions(
        probe=probe or _example_probe(captured.program.contract, calibration) or _text_probe(captured, resolved),
        limits=Limits(**{name: getattr(limits, asked) for asked, name in LIMITS.items()}),
        dump_ir=run.dump_ir,
        work_dir=run.work_dir,
        allow_noop=limits.allow_noop,
        context=PassContext(
            seed=limits.seed,
            calibration=calibration,
            obstacle=functools.partial(obstacle, resolved.target.legal),
        ),
        progress=progress,
    )


_PROBE_ROWS = 8
"""Rows of the gate's probe where the first axis of all inputs may have any size."""


def _example_probe(contract: Contract, calibration: Calibration | None) -> Probe | None:
    """Rows of a module's calibration data for the gate: what its inputs are like, which made-up ones need not be."""
    if calibration is None or not isinstance(calibration.tokens, Examples):
        return None
    inputs = calibration.tokens.batches[-1]
    if all(spec.dims and isinstance(spec.dims[0], str) for spec in contract.inputs):
        inputs = tuple(item[:_PROBE_ROWS] for item in inputs)
    return Probe(tensors=inputs)


def _text_probe(captured: Captured, resolved: Resolved) -> Probe | None:
    """Encoded text for the gate, or None (random tokens) where there is no tokenizer.

    Raises:
        InputError: a text was asked for and is too short.
    """
    tokens, asked = captured.tokens, resolved.request.gate.text
    longest = min(96, captured.program.contract.model.context_length or 96, _capacity(resolved) or 96)
    if len(tokens) > 3 * longest:
        return text_probe(tokens, longest=longest)
    if asked is not None:
        raise InputError(
            "the gate's text is too short",
            where=str(asked),
            why=f"{len(tokens)} tokens, more than {3 * longest} are needed",
            remedy="give a longer text, or leave --text out",
        )
    return None


def load(folder: str | Path, **options: Any) -> Any:
    """Verify an artifact and open it: `optc.load(path).generate("Once upon a time")`.

    That of an encoder or a plain module is called: `optc.load(path)(images)`, `optc.load(path)(["a text"])`; see
    `optc.runtime.sessions.tensor_model.TensorModel`.

    Its engine reads it in this process. So one that was not made on this machine needs the signature of a trusted key,
    or trust=True; `optc run` and the other commands open such artifacts in a process of their own.

    Raises:
        ArtifactError: damaged or incomplete, or nobody vouches for it (7).  TargetError: this host cannot run it (4).
        UsageError: an option of another type or out of range (2).
    """
    check_type("folder", folder, str | Path, "the folder of an artifact")
    from optc.runtime.sessions.load import load_any

    return load_any(Path(folder), isolated=False, **options)


__all__ = ["CompileResult", "TargetError", "capture", "compile", "load"]

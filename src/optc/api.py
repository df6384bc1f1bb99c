"""The public Python API: capture, compile, load."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from optc.calibrating import make_calibration
from optc.compiler.artifact import folder as artifact
from optc.compiler.artifact.manifest import Manifest, Source
from optc.compiler.calibration.sequences import DEFAULT_LENGTH, DEFAULT_SAMPLES, Calibration
from optc.compiler.capture import capture_model, capture_module, capture_pretrained
from optc.compiler.capture.pretrained import DTYPES
from optc.compiler.diagnostics import TargetError, UsageError, os_errors, unknown_name
from optc.compiler.execution.probe import Probe, text_probe
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import CheckpointInfo, config_digest, weights_digest
from optc.compiler.model_folder.quantized import refuse_quantizing_again
from optc.compiler.pipeline.gate import Budget
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions, PipelineResult, compute_dtype
from optc.compiler.pipeline.quantization_summary import quantized_linears, summarize
from optc.compiler.rewriting.passes import Pass, PassContext
from optc.compiler.target.target import (
    CompileOptions,
    ExportRequest,
    ExportResult,
    Step,
    Target,
    check_context,
    check_legal,
    check_options,
    with_defaults,
)
from optc.exporters.reports.report import write_report
from optc.recipes import apply_pass_options, parse_passes
from optc.targets import find_target
from optc.targets.methods import resolve
from optc.targets.registry import installed_targets

Model = str | Path | torch.nn.Module | Program


@dataclass(frozen=True)
class CompileResult:
    """What `compile` wrote: the artifact's folder and its manifest."""

    artifact: Path
    manifest: Manifest

    def to_dict(self) -> dict[str, Any]:
        """The object that `optc compile --json` prints."""
        rows = [
            {"name": row.name, "matched": row.matched, "candidates": row.candidates, "seconds": row.seconds,
             "max_abs_diff": row.max_abs_diff, "kl": row.kl, "top1_agreement": row.top1_agreement,
             "notes": list(row.notes)}
            for row in self.manifest.passes
        ]  # fmt: skip
        return {
            "artifact": str(self.artifact),
            "target": self.manifest.target,
            "seconds": self.manifest.seconds["total"],
            "weight_bytes": self.manifest.weight_bytes,
            "quantization": self.manifest.quantization,
            "passes": rows,
        }


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """Everything about a compile that is not the model: what, where to, and how it is watched.

    Attributes:
        passes: requested passes instead of the target's recipe (names, or {name: options}).
        pass_options: `NAME.OPTION=VALUE` settings on the recipe's passes.
        text: text for the gate; None takes a short built-in passage.
        budget: limits for lossy passes; None takes the default for the bits.
        calibration: what calibrated quantization reads: a file (text, .jsonl or .json of token ids), token sequences
            as int64 [n, L], or None for the built-in text.
        calibration_samples, calibration_seq_len: how many sequences, and tokens in each.
    """

    options: CompileOptions = field(default_factory=CompileOptions)
    passes: Sequence[str | dict[str, Any] | Pass] | None = None
    pass_options: Sequence[str] = ()
    force: bool = False
    allow_noop: bool = False
    dump_ir: Path | None = None
    work_dir: Path | None = None
    text: Path | None = None
    budget: Budget | None = None
    seed: int = 0
    calibration: Path | torch.Tensor | None = None
    calibration_samples: int = DEFAULT_SAMPLES
    calibration_seq_len: int = DEFAULT_LENGTH
    trust_remote_code: bool = False
    progress: Callable[[int, str], None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def capture(
    model: Model,
    example_inputs: Sequence[torch.Tensor] | None = None,
    *,
    dtype: str = "fp32",
    dynamic: dict[str, dict[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """Capture a model folder, a transformers model, or an nn.Module with example inputs.

    Args:
        dtype: fp32, bf16 or fp16: compute type for a model folder (a module keeps its own).
        dynamic, input_names: for an nn.Module, see `optc.compiler.capture.capture_module`.

    Raises:
        InputError, CaptureError: the model cannot be read or exported.
        UsageError: an nn.Module without example inputs.
    """
    if isinstance(model, Program):
        return model
    if isinstance(model, str | Path):
        return capture_pretrained(model, dtype=_known_dtype(dtype), trust_remote_code=trust_remote_code)[0]
    if example_inputs is not None:
        return capture_module(model, example_inputs, dynamic=dynamic, input_names=input_names)
    if hasattr(model, "config") and hasattr(model.config, "model_type"):
        return capture_model(model)
    raise UsageError(
        f"{type(model).__name__} needs example inputs",
        remedy="optc.capture(module, (tensor, ...), dynamic={...})",
    )


def compile(
    model: Model,
    *,
    target: str,
    output: str | Path,
    quant: str | None = None,
    example_inputs: Sequence[torch.Tensor] | None = None,
    settings: CompileSettings | None = None,
    **options: Any,
) -> CompileResult:
    """Compile a model for a target and write the artifact.

    Args:
        model: model folder, transformers model, nn.Module (with `example_inputs`) or Program.
        target: target name (`optc targets`).
        output: the artifact's folder; must not exist unless `force=True`.
        quant: quantization method, or None.
        options: fields of `CompileOptions` and `CompileSettings` (bits=, group_size=, force=, ...).

    Raises:
        OptcError: of the class that fits; see `optc.compiler.diagnostics` for exit codes.
    """
    begin = time.perf_counter()
    settings = _settings(settings, quant, options)
    found = find_target(target)
    check_request(found, settings.options)
    settings = dataclasses.replace(settings, options=chosen_options(found, settings.options))
    folder = Path(output)
    artifact.check_output(folder, settings.force)
    if settings.options.quant is not None and isinstance(model, str | Path):
        refuse_quantizing_again(Path(model))
    program, info = _captured(model, example_inputs, settings)
    check_context(settings.options, program.contract.model.context_length)
    seconds = {"capture": time.perf_counter() - begin}
    steps = recipe_steps(found, program.contract.kind, settings)
    calibration = None
    if any(step.rewrite.calibrated for step in steps):
        calibration = make_calibration(program, info, settings)
    pipeline_options = _pipeline_options(program, info, found, settings, calibration)
    result = Pipeline(steps).run(program, pipeline_options)
    check_legal(result.program, found)
    seconds["passes"] = time.perf_counter() - begin - seconds["capture"]
    manifest = _write(folder, found, settings, result, info, seconds, begin)
    return CompileResult(folder, manifest)


def check_request(target: Target, options: CompileOptions) -> None:
    """Refuse unknown names (UsageError) and what the target cannot do (TargetError), weights unread."""
    _known_dtype(options.dtype or target.dtypes[0])
    check_options(target, chosen_options(target, options), installed_targets)


def chosen_options(target: Target, options: CompileOptions) -> CompileOptions:
    """Options with what the target and the quantization method stand for filled in.

    Raises:
        UsageError: unknown method, or bits or a group size for a method that has its own.
    """
    return resolve(with_defaults(target, options))


def recipe_steps(target: Target, kind: str, settings: CompileSettings) -> list[Step]:
    """The passes of a compile: the requested ones, or the target's recipe, with settings applied."""
    if settings.passes is None:
        steps = target.recipe(kind, chosen_options(target, settings.options))
    else:
        steps = []
        for item in settings.passes:
            steps += [Step(item)] if isinstance(item, Pass) else parse_passes([item], settings.options)
    return apply_pass_options(steps, settings.pass_options)


def _settings(
    settings: CompileSettings | None, quant: str | None, options: dict[str, Any]
) -> CompileSettings:
    settings = settings or CompileSettings()
    chosen: dict[str, Any] = {"quant": quant} if quant is not None else {}
    names = {item.name for item in dataclasses.fields(CompileOptions)}
    outer = {item.name for item in dataclasses.fields(CompileSettings)} - {"options", "seconds"}
    for key, value in options.items():
        if key in names:
            chosen[key] = value
        elif key not in outer:
            raise unknown_name("option", key, names | outer)
    rest = {key: value for key, value in options.items() if key in outer}
    return dataclasses.replace(settings, options=dataclasses.replace(settings.options, **chosen), **rest)


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    return dtype


def _captured(
    model: Model, example_inputs: Sequence[torch.Tensor] | None, settings: CompileSettings
) -> tuple[Program, CheckpointInfo | None]:
    if isinstance(model, str | Path):
        assert settings.options.dtype is not None
        return capture_pretrained(
            model, dtype=settings.options.dtype, trust_remote_code=settings.trust_remote_code
        )
    return capture(model, example_inputs), None


def _pipeline_options(
    program: Program, info: CheckpointInfo | None, target: Target, settings: CompileSettings,
    calibration: Calibration | None,
) -> PipelineOptions:  # fmt: skip
    return PipelineOptions(
        probe=_text_probe(program, info, settings),
        budget=settings.budget,
        dump_ir=settings.dump_ir,
        work_dir=settings.work_dir,
        allow_noop=settings.allow_noop,
        context=PassContext(seed=settings.seed, calibration=calibration),
        progress=settings.progress,
    )


def _text_probe(program: Program, info: CheckpointInfo | None, settings: CompileSettings) -> Probe | None:
    """Encoded text for the gate, or None (random tokens) where there is no tokenizer."""
    if info is None or not info.has_tokenizer or program.contract.kind == "module":
        if settings.text is not None:
            raise UsageError("--text needs a model folder with a tokenizer", remedy="leave --text out")
        return None
    from optc.runtime.generation.tokenizer import load_tokenizer

    if settings.text is not None:
        with os_errors("reading the gate's text", str(settings.text)):
            text = settings.text.read_text(errors="replace")[:20_000]
    else:
        text = (resources.files("optc.compiler") / "data" / "passage.txt").read_text()
    tokenizer = load_tokenizer(info.path)
    assert tokenizer is not None
    tokens = tokenizer.encode(text)
    longest = min(96, program.contract.model.context_length or 96, settings.options.max_seq_len or 96)
    return text_probe(tokens, longest=longest) if len(tokens) > 3 * longest else None


def _write(
    folder: Path, target: Target, settings: CompileSettings, result: PipelineResult,
    info: CheckpointInfo | None, seconds: dict[str, float], begin: float,
) -> Manifest:  # fmt: skip
    """Export into a temporary sibling, describe it, read it back, publish it."""
    if settings.progress:
        settings.progress(len(result.records), "exporting")
    with artifact.write_folder(folder, force=settings.force) as directory:
        start = time.perf_counter()
        request = ExportRequest(
            directory=directory, options=settings.options, source=info.path if info else None
        )
        exported = target.export(result.program, request)
        seconds["export"] = time.perf_counter() - start
        with os_errors("writing the stages' text", str(directory)):
            (directory / "ir").mkdir()
            for stage in result.stages:
                (directory / "ir" / stage.file_name).write_text(stage.text)
        seconds["total"] = time.perf_counter() - begin
        manifest = _manifest(target, result, exported, info, seconds)
        write_report(directory, manifest)
        return artifact.finish(directory, manifest)


def _manifest(
    target: Target, result: PipelineResult, exported: ExportResult, info: CheckpointInfo | None,
    seconds: dict[str, float],
) -> Manifest:  # fmt: skip
    program = result.program
    return Manifest(
        optc_version=metadata.version("optc"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        target=target.name,
        engine=exported.engine,
        engine_info=exported.info,
        needs={"machine": platform.machine(), **exported.needs},
        dtype=str(compute_dtype(program)).removeprefix("torch."),
        contract=program.contract,
        source=_source(info)
        if info
        else Source(path="", config_sha256="", weights_sha256="", parameters=0, dtype=""),
        passes=result.records,
        weight_bytes=exported.weight_bytes,
        quantization=summarize(program.contract, quantized_linears(result.records), exported.tensor_bytes),
        seconds={key: round(value, 3) for key, value in seconds.items()},
    )


def _source(info: CheckpointInfo) -> Source:
    parameters = sum(int(torch.Size(tensor.shape).numel()) for tensor in info.tensors.values())
    return Source(
        path=str(info.path.resolve()),
        config_sha256=config_digest(info),
        weights_sha256=weights_digest(info),
        parameters=parameters,
        dtype=str(info.config.get("dtype") or info.config.get("torch_dtype") or ""),
    )


def load(folder: str | Path, **options: Any) -> Any:
    """Verify an artifact and open it for generation: `optc.load(path).generate("Once upon a time")`.

    Raises:
        ArtifactError: damaged or incomplete (7).  TargetError: this host cannot run it (4).
    """
    from optc.runtime.sessions.load import load as load_artifact

    return load_artifact(Path(folder), **options)


__all__ = ["CompileResult", "CompileSettings", "TargetError", "capture", "compile", "load"]

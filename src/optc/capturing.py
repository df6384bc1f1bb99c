"""From whatever users call a model to a captured and proved Program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec
import torch
from torch.export import ExportedProgram

from optc.compiler.capture import (
    capture_encoder_decoder,
    capture_model,
    capture_module,
    capture_pretrained,
    capture_pretrained_pair,
)
from optc.compiler.capture.eagle3 import capture_eagle3
from optc.compiler.capture.exported import capture_exported, capture_exported_file
from optc.compiler.capture.facts import generates_from_an_encoder
from optc.compiler.capture.loading import is_encoder_decoder
from optc.compiler.capture.pretrained import CPU
from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.files import open_plain
from optc.compiler.ir.program import Program
from optc.compiler.ir.proof import CaptureProof
from optc.compiler.ir.saved.exported_archive import is_exported_file
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_folder, prevailing
from optc.compiler.model_folder.config_file import parts_beside
from optc.compiler.model_folder.dtypes import DTYPES, dtype_name
from optc.compiler.model_folder.eagle3 import is_eagle3
from optc.compiler.model_folder.sentence import modules_behind, sentence_modules
from optc.compiler.settings.fields import check_type
from optc.hub import local_model

Model = str | Path | torch.nn.Module | Program | ExportedProgram
_MODELS = "a model folder, a .pt2 file, a transformers model, an nn.Module, an ExportedProgram or a Program"


@dataclass(frozen=True)
class Captured:
    """What a compile starts from.

    Attributes:
        info: the model folder; None for a model in memory.
        tokens: the gate's text, encoded; empty without a tokenizer.
        proof: how the program was held to the model.
        encoder: what the program reads, of an encoder-decoder model.
    """

    program: Program
    info: CheckpointInfo | None
    tokens: list[int]
    proof: CaptureProof
    encoder: Program | None = None


def capture(
    model: Model,
    example_inputs: Sequence[torch.Tensor] | None = None,
    *,
    dtype: str = "fp32",
    dynamic: dict[str, dict[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    prove: bool = True,
    base: str | Path | None = None,
    pooling: str | None = None,
) -> Program:
    """Capture a model folder, a transformers model, an nn.Module with example inputs, or an exported program.

    The program is run and compared with the model's own forward; its `proof` holds the figures. A program of
    torch.export, in memory or in a file of `torch.export.save`, is taken as it is.

    Args:
        dtype: fp32, bf16 or fp16: compute type for a model folder (a module keeps its own).
        dynamic, input_names: for an nn.Module, see `optc.compiler.capture.capture_module`.
        prove: False leaves the comparison out: whatever was captured is believed.
        base: of a draft model's folder, the model folder that it drafts for.
        pooling: of a model folder, how embeddings are made of its hidden states; None is what `modules.json` says.

    Raises:
        InputError, CaptureError: the model cannot be read or exported.
        GateError: the program is not what the model computes.
        UsageError: an nn.Module without example inputs, or an argument of another type.
    """
    check_type("dtype", dtype, str, f"one of {', '.join(sorted(DTYPES))}")
    for name, value in (("trust_remote_code", trust_remote_code), ("prove", prove)):
        check_type(name, value, bool, "True or False")
    check_type("pooling", pooling, str | None, "a way of pooling: mean, cls, lasttoken, none")
    check_type("model", model, Model, _MODELS)
    model = local_model(model)
    if isinstance(model, str | Path) and not is_exported_file(Path(model)):
        return _folder(Path(model), dtype, trust_remote_code, prove=prove, base=_path(base), pooling=pooling)[0]
    _refuse_pooling(pooling)
    if isinstance(model, Program):
        return model
    if isinstance(model, ExportedProgram):
        return capture_exported(model)
    if isinstance(model, str | Path):
        _refuse_base(_path(base))
        return capture_exported_file(Path(model))
    if example_inputs is not None:
        return capture_module(model, example_inputs, dynamic=dynamic, input_names=input_names, prove=prove)
    if hasattr(model, "config") and hasattr(model.config, "model_type"):
        return capture_model(model, prove=prove)
    raise UsageError(
        f"{type(model).__name__} needs example inputs",
        remedy="optc.capture(module, (tensor, ...), dynamic={...})",
    )


def stored_dtype(model: Model, trust_remote_code: bool) -> str | None:
    """fp32, bf16 or fp16: what most of a model's floating weights are; None where that is another type.

    Raises:
        InputError: as `capture`.
    """
    check_type("model", model, Model, _MODELS)
    if isinstance(model, ExportedProgram) or (isinstance(model, str | Path) and is_exported_file(Path(model))):
        model = capture(model)
    if isinstance(model, str | Path):
        return dtype_name(check_folder(Path(model), trust_remote_code=trust_remote_code).dtype)
    weights = model.exported.state_dict.values() if isinstance(model, Program) else model.state_dict().values()
    return dtype_name(prevailing((weight.dtype, weight.numel()) for weight in weights if weight.is_floating_point()))


def capture_for_compile(
    model: Model,
    example_inputs: Sequence[torch.Tensor] | None,
    *,
    dtype: str,
    trust_remote_code: bool,
    text: Path | None,
    work_folder: Path | None,
    device: torch.device,
    base: Path | None = None,
    pooling: str | None = None,
) -> Captured:
    """Capture what `compile` was given.

    Args:
        text: file of the gate's text; None takes the built-in passage.
        work_folder: where large tensors wait while a large model is compiled.
        device: where a model folder is captured and proved.
        base, pooling: see `capture`.

    Raises:
        OptcError: as `capture`; UsageError for a text without a tokenizer.
    """
    if isinstance(model, str | Path) and not is_exported_file(Path(model)):
        folder = check_folder(Path(model), trust_remote_code=trust_remote_code)
        if not is_eagle3(Path(model)) and _is_pair(folder, pooling):
            _refuse_base(base)
            if pooling is not None:
                raise UsageError("--pooling none has no effect on an encoder-decoder model", remedy="leave it out")
            tokens = gate_tokens(folder, text)
            pair, info = capture_pretrained_pair(
                model,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                work_folder=work_folder,
                device=device,
                tokens=tokens,
            )
            assert pair.decoder.proof is not None
            return Captured(pair.decoder, info, tokens, _with_notes(pair.decoder.proof, info, pooling), pair.encoder)
        program, info, tokens = _folder(
            Path(model), dtype, trust_remote_code, text, work_folder, device, base=base, pooling=pooling
        )
        assert program.proof is not None
        return Captured(program, info, tokens, _with_notes(program.proof, info, pooling))
    _refuse_base(base)
    _refuse_pooling(pooling)
    tokens = gate_tokens(None, text)
    if isinstance(model, torch.nn.Module) and generates_from_an_encoder(type(model)):
        pair = capture_encoder_decoder(model)
        assert pair.decoder.proof is not None
        return Captured(pair.decoder, None, tokens, pair.decoder.proof, pair.encoder)
    program = capture(model, example_inputs)
    given = CaptureProof(proved=False, notes=("the program was given as it is, and not captured by this compile",))
    return Captured(program, None, tokens, program.proof or given)


def _is_pair(folder: CheckpointInfo, pooling: str | None) -> bool:
    """Whether a folder becomes two programs: an encoder-decoder model of which no embeddings are asked."""
    return sentence_modules(folder.path, pooling) is None and is_encoder_decoder(folder)


def _with_notes(proof: CaptureProof, info: CheckpointInfo, pooling: str | None) -> CaptureProof:
    """The proof, with notes where the folder holds more than was captured: for sentence-transformers, for pictures."""
    notes = []
    if pooling in (None, "none") and (behind := modules_behind(info.path)):
        captured = "not captured, the output is the model's own" if pooling else "captured with it, as one program"
        notes.append(f"modules.json has {', '.join(behind)} behind the model: {captured}")
    if beside := parts_beside(info.config):
        notes.append(f"config.json has {', '.join(beside)} beside text_config: the language model alone is captured")
    return msgspec.structs.replace(proof, notes=(*proof.notes, *notes))


def _folder(
    folder: Path,
    dtype: str,
    trust_remote_code: bool,
    text: Path | None = None,
    work_folder: Path | None = None,
    device: torch.device = CPU,
    *,
    prove: bool = True,
    base: Path | None = None,
    pooling: str | None = None,
) -> tuple[Program, CheckpointInfo, list[int]]:
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if is_eagle3(folder):
        _refuse_pooling(pooling)
        program, info = capture_eagle3(folder, base, dtype=dtype, prove=prove)
        return program, info, gate_tokens(info, text)
    _refuse_base(base)
    tokens = gate_tokens(check_folder(folder, trust_remote_code=trust_remote_code), text)
    program, info = capture_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        work_folder=work_folder,
        device=device,
        prove=prove,
        tokens=tokens,
        pooling=pooling,
    )
    return program, info, tokens if program.contract.kind != "module" else []  # pictures


def _path(value: str | Path | None) -> Path | None:
    check_type("base", value, str | Path | None, "the folder of a model")
    return None if value is None else Path(value)


def _refuse_base(base: Path | None) -> None:
    """Only a draft model has one.

    Raises:
        UsageError: another model was given one.
    """
    if base is not None:
        raise UsageError("--base has no effect: the model is no draft model's folder", remedy="leave it out")


def _refuse_pooling(pooling: str | None) -> None:
    """Only a model folder has hidden states that are known.

    Raises:
        UsageError: pooling was asked for.
    """
    if pooling is not None:
        raise UsageError(
            "--pooling has no effect on what is no model folder of transformers",
            remedy="leave it out, and put the pooling into the module",
        )


_GATE_CHARACTERS = 20_000


def gate_tokens(info: CheckpointInfo | None, text: Path | None) -> list[int]:
    """The gate's text in the model's tokens: a file, else a built-in passage; empty where there is no tokenizer.

    Raises:
        UsageError: a file was given, and there is no tokenizer.
    """
    if info is None or not info.has_tokenizer:
        if text is not None:
            raise UsageError("--text needs a model folder with a tokenizer", remedy="leave --text out")
        return []
    from optc.runtime.generation.tokenizer import load_tokenizer

    if text is not None:
        with open_plain(text, "reading the gate's text") as file:
            page = file.read(4 * _GATE_CHARACTERS + 4).decode(errors="replace")[:_GATE_CHARACTERS]
    else:
        page = (resources.files("optc.compiler") / "data" / "passage.txt").read_text()
    tokenizer = load_tokenizer(info.path)
    assert tokenizer is not None
    return tokenizer.encode(page)

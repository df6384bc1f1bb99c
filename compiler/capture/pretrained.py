"""Capture of Hugging Face models: decoders (position ids in, logits out) and encoders."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from optc.compiler import compat
from optc.compiler.capture.attention import NAME, AttentionError, indexed_masks, one_sequence_a_row, register
from optc.compiler.capture.embedding import EmbeddingHead, load_embedder
from optc.compiler.capture.encoder_decoder import EncoderDecoder, capture_encoder_decoder
from optc.compiler.capture.eval_mode import in_eval_mode
from optc.compiler.capture.facts import (
    attention_layers,
    generates_from_an_encoder,
    model_facts,
    reads_pictures,
    rotary_limit,
    stated_context,
    text_config,
)
from optc.compiler.capture.implementations import implementations
from optc.compiler.capture.loading import RESIDENT_BYTES, load_model
from optc.compiler.capture.outputs import named_outputs
from optc.compiler.capture.own_positions import drop_whole_padding, lift_positions
from optc.compiler.capture.pictures import capture_pictures
from optc.compiler.capture.positions import position_offset
from optc.compiler.capture.proof import SHORTEST, prove_model
from optc.compiler.capture.recurrent import recurrent_functions
from optc.compiler.capture.renames import expert_rows
from optc.compiler.capture.restored import restore_codes
from optc.compiler.capture.rotary import short_frequencies
from optc.compiler.capture.selections import whole_selections
from optc.compiler.capture.shells import DecoderShell, EmbedderShell, EncoderShell, takes_positions
from optc.compiler.diagnostics import CaptureError, GateError, unknown_name
from optc.compiler.formats.layouts.tensors import CPU
from optc.compiler.ir.contract import Contract, Input
from optc.compiler.ir.deferred import SingleSizes, has_data_sizes
from optc.compiler.ir.export import SizeConditionError, run_export
from optc.compiler.ir.lazy_weights import LazyWeight
from optc.compiler.ir.program import Program
from optc.compiler.ir.stored_weights import WorkFile
from optc.compiler.model_folder.checkpoint import (
    CheckpointInfo,
    check_folder,
    match_names,
)
from optc.compiler.model_folder.dtypes import DTYPES
from optc.compiler.model_folder.pictures import picture_size
from optc.compiler.model_folder.quantized import quantized_folder
from optc.compiler.model_folder.sentence import sentence_modules

ATTENTIONS = (NAME, "sdpa", "eager")
_MAX_BATCH = 1024


def capture_pretrained(
    folder: str | Path,
    *,
    dtype: str = "fp32",
    trust_remote_code: bool | None = None,
    work_folder: Path | None = None,
    device: torch.device = CPU,
    prove: bool = True,
    tokens: Sequence[int] = (),
    pooling: str | None = None,
) -> tuple[Program, CheckpointInfo]:
    """Capture a model folder, of text or of pictures. Linears of a folder that is already quantized read `optc.dequantize` of its codes.

    A folder of sentence-transformers becomes one program with its modules: token ids and mask in, embeddings out.

    Weights that take more than `RESIDENT_BYTES` in the compute type stay in the folder's files, and large tensors that
    passes make go to a work file.

    Args:
        work_folder: where the work file is; None takes the system's folder for temporary files.
        device: where the model is captured and proved, with all its weights there; a folder that is quantized stays
            on the CPU.
        pooling: see `sentence_modules`.
        prove, tokens: see `capture_model`; of a quantized folder the capture is proved before it reads codes.

    Raises:
        InputError: unusable folder (see `load_model`).
        CaptureError: the model cannot be exported or has a mask that cannot be expressed; a module that is not known.
        GateError: the program is not what the model computes.
        UsageError: a pooling that contradicts the folder.
    """
    modules = sentence_modules(Path(folder), pooling)
    elsewhere = device.type != "cpu" and (
        quantized_folder(check_folder(Path(folder), trust_remote_code=trust_remote_code)) is None
    )
    resident = None if elsewhere else RESIDENT_BYTES
    head = None
    if modules is None:
        model, info = load_model(
            folder,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            resident_bytes=resident,
            device=device if elsewhere else CPU,
        )
    else:
        model, head, info = load_embedder(
            Path(folder), modules, dtype=dtype, trust_remote_code=trust_remote_code, resident_bytes=resident
        )
        head = head.to(device) if elsewhere else head
    model = model.to(device) if elsewhere else model
    if reads_pictures(type(model)):
        program = capture_pictures(model, picture_size(info.path, info.config), prove=prove)
    else:
        program = capture_model(model, prove=prove, tokens=tokens, head=head)
    if any(isinstance(tensor, LazyWeight) for _, tensor in program.weights()):
        program.work_file = WorkFile(work_folder)
    quantized = quantized_folder(info)
    if quantized is not None:
        proof = program.proof
        names = match_names(quantized.dense.tensors, program.exported.state_dict)
        experts = expert_rows(model, model.state_dict())
        program = restore_codes(program, quantized, names, experts)
        program.proof = proof
    return program, info


def capture_pretrained_pair(
    folder: str | Path,
    *,
    dtype: str = "fp32",
    trust_remote_code: bool | None = None,
    work_folder: Path | None = None,
    device: torch.device = CPU,
    tokens: Sequence[int] = (),
) -> tuple[EncoderDecoder, CheckpointInfo]:
    """Capture and prove the folder of an encoder-decoder model; arguments as `capture_pretrained`.

    Raises:
        InputError, CaptureError, GateError: as `capture_pretrained`; CaptureError also for a quantized folder.
    """
    info = check_folder(Path(folder), trust_remote_code=trust_remote_code)
    if quantized_folder(info) is not None:
        raise CaptureError(
            "quantized folders of encoder-decoder models are not supported",
            where=str(folder),
            remedy="give the unquantized model, and add --quant rtn",
        )
    resident = RESIDENT_BYTES if device.type == "cpu" else None
    model, info = load_model(folder, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, resident_bytes=resident)
    pair = capture_encoder_decoder(model.to(device), tokens=tokens)
    for program in (pair.encoder, pair.decoder):
        if any(isinstance(tensor, LazyWeight) for _, tensor in program.weights()):
            program.work_file = WorkFile(work_folder)
    return pair, info


@in_eval_mode
def capture_model(
    model: torch.nn.Module,
    *,
    attention: str = NAME,
    prove: bool = True,
    tokens: Sequence[int] = (),
    head: EmbeddingHead | None = None,
) -> Program:
    """Capture a transformers model in memory: decoder when it makes causal attention, else encoder.

    The model's attention implementation is set for the time of the capture. Where `optc.attention` cannot say what a
    layer computes (attention of a table of the model's own, biases, other masks), transformers' eager attention is
    captured, which the notes of the proof say.

    Args:
        attention: "optc" gives one `optc.attention` per layer. "sdpa" and "eager" give transformers' own
            attention, mask and all, for the pass fuse-attention to find.
        prove: run the program and compare it with the model's own forward; the program's `proof` says how.
        tokens: encoded text for the proof; random tokens are taken where there is too little.
        head: what makes embeddings of the model's hidden states; they are the program's output then.

    Raises:
        UsageError: unknown attention implementation.
        CaptureError: the model cannot be exported, or does not support this attention.
        GateError: the program is not what the model computes, or the model overflows in its type.
    """
    if attention not in ATTENTIONS:
        raise unknown_name("attention implementation", attention, ATTENTIONS)
    rotary_limit(model.config)  # refuses what is not stated
    _refuse_encoder_decoder(model)
    if attention == "sdpa" and not getattr(model, "_supports_sdpa", False):
        raise CaptureError(
            "the model does not support transformers' sdpa attention",
            where=type(model).__name__,
            remedy="capture with attention='optc' or 'eager'",
        )
    register()
    program, failure = None, None
    try:
        program = _proved(model, attention, head, tokens, prove=prove)
    except CaptureError as error:
        if not (prove and compat.is_data_dependence(error.__cause__)):
            raise
        failure = error
    if program is not None and not (prove and has_data_sizes(program.exported)):
        return program
    try:
        return _proved(model, attention, head, tokens, prove=True, whole=True)
    except (CaptureError, GateError):
        if failure is not None:
            raise failure from failure.__cause__
    assert program is not None
    return program


def _proved(
    model: torch.nn.Module,
    attention: str,
    head: EmbeddingHead | None,
    tokens: Sequence[int],
    *,
    prove: bool,
    whole: bool = False,
) -> Program:
    """Capture, with eager attention where that is needed, and prove.

    Args:
        whole: compute rows that the model selects by its data for all rows (see `selections`).

    Raises:
        CaptureError, GateError: as `capture_model`.
    """
    notes = ["rows that the model selects by what the data say are computed for all rows"] if whole else []
    try:
        program, offset, lengths = _captured(model, attention, head, prove=prove, whole=whole)
    except AttentionError as error:
        if attention != NAME:
            raise
        notes.append(f"captured with eager attention: {error.what}")
        program, offset, lengths = _captured(model, "eager", head, prove=prove, whole=whole)
    if prove:
        proof = prove_model(program, model, tokens=tokens, offset=offset, head=head, lengths=lengths)
        rotary = _rotary_note(model.config, rotary_limit(model.config))
        program.proof = msgspec.structs.replace(proof, notes=(*proof.notes, *notes, *filter(None, (rotary,))))
    return program


def _rotary_note(config: Any, limit: int) -> str:
    """What a capture of rotary embeddings that depend on the length covers."""
    stated = _context(config)
    if not limit or limit >= stated:
        return ""
    return f"up to {limit} tokens, of {stated}: rotary frequencies are those of short sequences, and change beyond"


def _refuse_encoder_decoder(model: torch.nn.Module) -> None:
    """One program cannot be both sides of an encoder-decoder model.

    Raises:
        CaptureError: the model is one.
    """
    if generates_from_an_encoder(type(model)):
        raise CaptureError(
            "an encoder-decoder model is two programs",
            where=type(model).__name__,
            remedy="optc compile takes it whole; in Python, optc.compiler.capture.capture_encoder_decoder gives both",
        )
    # Encoders of their own have the config of the whole.
    decodes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    if decodes and getattr(model.config, "is_encoder_decoder", False):
        raise CaptureError(
            "encoder-decoder models without a head that chooses tokens are not supported",
            where=type(model).__name__,
            remedy="use the class with its language model head (...ForConditionalGeneration), or encoder or decoder alone",
        )


def _captured(
    model: torch.nn.Module, attention: str, head: EmbeddingHead | None, *, prove: bool, whole: bool
) -> tuple[Program, int, list[int]]:
    """The program, what the model adds to positions that are counted from 0, and lengths at which it has to be proved."""
    excepted = SingleSizes(SHORTEST) if prove else None
    try:
        with implementations(model, attention, NAME):
            offset = position_offset(model)
            selections = whole_selections(model) if whole else nullcontext()
            rows = one_sequence_a_row() if attention == NAME else nullcontext()
            with indexed_masks(), rows, recurrent_functions(model), short_frequencies(model), selections:
                program = _export(model, model.config, offset, head, excepted)
        return program, offset, _excepted_lengths(program, excepted)
    except CaptureError as error:
        error.where = error.where or type(model).__name__
        raise


def _excepted_lengths(program: Program, excepted: SingleSizes | None) -> list[int]:
    """The lengths of sequences that the graph was made without.

    Raises:
        CaptureError: it was made without some number of rows.
    """
    if excepted is None:
        return []
    length = str(program.user_inputs()[0].meta["val"].shape[1])
    other = {symbol: sizes for symbol, sizes in excepted.found.items() if symbol != length}
    if other:
        raise CaptureError(
            "torch.export cannot make one graph for all numbers of rows",
            why="; ".join(f"{symbol} = {', '.join(map(str, sorted(sizes)))}" for symbol, sizes in other.items()),
            remedy="the model specializes on the number of rows: capture it as a module, optc.capture(module, inputs)",
        )
    return sorted(excepted.found.get(length, ()))


def _export(
    model: torch.nn.Module, config: Any, offset: int, head: EmbeddingHead | None, excepted: SingleSizes | None
) -> Program:
    """`_export_for` the context that the config states, or one token less.

    Some models cut a table of as many rows as the context has, and torch takes its whole length for a case of its own.
    """
    context = min(filter(None, (_context(config), rotary_limit(config)))) - offset
    if head is not None and head.described.most_tokens is not None:
        context = min(context, head.described.most_tokens)
    try:
        return _export_for(model, config, offset, context, head, excepted)
    except CaptureError as error:
        condition = error.__cause__.__cause__ if error.__cause__ is not None else None
        if not (isinstance(condition, SizeConditionError) and context in condition.sizes.values() and context > 1):
            raise
        return _export_for(model, config, offset, context - 1, head, excepted)


def _export_for(
    model: torch.nn.Module,
    config: Any,
    offset: int,
    context: int,
    head: EmbeddingHead | None,
    excepted: SingleSizes | None,
) -> Program:
    """The model as a program; a decoder adds `offset` to the positions that it takes, an encoder by itself."""
    decoder = not _is_encoder(model)
    batch, seq = Dim("batch", min=1, max=_MAX_BATCH), Dim("seq", min=1, max=context)
    length = min(11, context)
    device = next((weight.device for weight in model.parameters()), CPU)
    ids = torch.zeros((2, length), dtype=torch.long, device=device)
    dims = {0: batch, 1: seq}
    i64: dict[str, Any] = {"dtype": "int64", "dims": ("batch", "seq")}
    inputs = [Input(name="input_ids", role="input_ids", **i64)]
    shell: DecoderShell | EncoderShell
    if decoder:
        position = torch.arange(length, device=device)[None].expand(2, -1).contiguous()
        shell = DecoderShell(model, offset)
        args: tuple[Tensor, ...] = (ids, position)
        inputs.append(Input(name="position_ids", role="position_ids", **i64))
    else:
        shell = EncoderShell(model) if head is None else EmbedderShell(model, head)
        args = (ids, torch.ones_like(ids))
        inputs.append(Input(name="attention_mask", role="attention_mask", **i64))
        if getattr(config, "type_vocab_size", 0):
            args += (torch.zeros_like(ids),)
            inputs.append(Input(name="token_type_ids", role="token_type_ids", **i64))
    where = type(model).__name__
    exported = run_export(shell, args, tuple(dims for _ in args), where=where, excepted=excepted)
    outputs = named_outputs(exported, config, shell)
    facts = model_facts(config, getattr(model, "generation_config", None))
    stated = max(0, facts.context_length - offset)
    if stated == 0 and head is not None:  # relative positions have no end of their own
        stated = head.described.most_tokens or 0
    contract = Contract(
        kind="decoder" if decoder else "encoder",
        inputs=tuple(inputs),
        outputs=outputs,
        position_rule=decoder,
        layers=attention_layers(exported),
        model=msgspec.structs.replace(facts, context_length=min(stated, context)),
        sources={name: (name,) for name in exported.state_dict},
        embedding=None if head is None else head.facts(_width(exported)),
    )
    program = Program(exported, contract)
    if decoder and drop_whole_padding(program) + (0 if takes_positions(model) else lift_positions(program)):
        program = program.changed()
    return program


def _width(exported: ExportedProgram) -> int:
    """Features of an embedding. Of another output it may be a number of tokens, which `int` would fix."""
    return int(exported.graph.output_node().args[0][0].meta["val"].shape[-1])


def _context(config: Any) -> int:
    return stated_context(text_config(config)) or 1 << 20


def _is_encoder(model: torch.nn.Module) -> bool:
    """A model is a decoder when transformers would generate with it, unless its config says that it is not causal (XLM)."""
    from transformers.generation import GenerationMixin

    return not isinstance(model, GenerationMixin) or getattr(model.config, "causal", None) is False

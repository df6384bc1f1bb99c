"""Calibration tokens for a compile: from the user's file, or from the text that ships with optc."""

from __future__ import annotations

from importlib import resources

import torch

from optc.compiler.calibration.documents import draw_documents
from optc.compiler.calibration.sequences import Calibration, cut_sequences
from optc.compiler.calibration.windows import Draw
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import CheckpointInfo
from optc.request import Request

BUILT_IN = "built-in text"


def make_calibration(program: Program, info: CheckpointInfo | None, request: Request) -> Calibration:
    """The calibration sequences of a compile.

    Raises:
        InputError: unreadable or too short a text, tokens outside the vocabulary, no tokenizer for a text.
        UsageError: a program that takes no tokens, or a tensor that is none of tokens.
    """
    facts = program.contract.model
    if program.contract.kind == "module":
        raise UsageError(
            "a plain module takes no calibration tokens", remedy="use --quant rtn or int8, which need none"
        )
    asked = request.calibration
    given = asked.calibration
    if isinstance(given, torch.Tensor):
        return _from_tensor(given, facts.vocab_size)
    length = min(asked.calibration_seq_len, facts.context_length or asked.calibration_seq_len)
    from optc.runtime.generation.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(info.path) if info is not None and info.has_tokenizer else None
    if given is not None:
        wanted = Draw(
            tokens=asked.calibration_samples * length, windows=asked.calibration_samples, seed=request.gate.seed
        )
        documents, source = draw_documents(given, tokenizer, wanted), str(given)
    elif tokenizer is None:
        raise InputError(
            "the model has no tokenizer to read the built-in calibration text with",
            where=str(info.path) if info else None,
            remedy='give token ids: --calibration FILE.jsonl with lines of {"tokens": [...]}',
        )
    else:
        text = (resources.files("optc.compiler") / "data" / "calibration.txt").read_text()
        documents, source = [tokenizer.encode(text)], BUILT_IN
    return cut_sequences(
        documents,
        samples=asked.calibration_samples,
        length=length,
        vocab_size=facts.vocab_size,
        seed=request.gate.seed,
        source=source,
    )


def _from_tensor(tokens: torch.Tensor, vocab_size: int) -> Calibration:
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise UsageError(
            f"calibration tokens are {tokens.dtype} with {tokens.dim()} axes",
            remedy="give int64 [samples, length]",
        )
    rows = [[int(token) for token in row] for row in tokens.tolist()]
    return cut_sequences(
        rows,
        samples=len(rows),
        length=int(tokens.shape[1]),
        vocab_size=vocab_size,
        seed=0,
        source="given tokens",
    )

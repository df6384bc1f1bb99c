"""Calibration tokens for a compile: from the user's file, or from the text that ships with optc."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from optc.compiler.calibration.documents import draw_documents
from optc.compiler.calibration.examples import Examples
from optc.compiler.calibration.sequences import Calibration, cut_sequences
from optc.compiler.calibration.windows import Draw
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import CheckpointInfo
from optc.request import Request
from optc.runtime.measuring.tensors import Batch, read_batches
from optc.runtime.sessions.tensor_model import Array, as_array, checked_inputs

BUILT_IN = "built-in text"


def make_calibration(program: Program, info: CheckpointInfo | None, request: Request) -> Calibration:
    """The calibration sequences of a compile.

    Raises:
        InputError: unreadable or too short a text, tokens outside the vocabulary, no tokenizer for a text.
        UsageError: a module without examples, or a tensor that is none of tokens.
    """
    facts = program.contract.model
    asked = request.calibration
    given = asked.calibration
    if program.contract.kind == "module":
        folder = None if info is None else info.path
        return _examples(program.contract, given, asked.calibration_samples, folder)
    if given is not None and not isinstance(given, torch.Tensor | Path):
        raise UsageError("a language model is calibrated by tokens, not by inputs", remedy="give a text or token ids")
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


_ROWS = 32
"""Rows of a call where the first axis may have any size."""


def _examples(contract: Contract, given: Any, samples: int, folder: Path | None) -> Calibration:
    """Example inputs of a module: files of arrays, or an iterable of tensors, tuples of them, or dicts by input.

    Files of pictures go through the processor of the model's folder, where it is one.

    Calls have as many rows as the contract says, and 32 where it leaves that open; at most `samples` rows are taken.

    Raises:
        UsageError: nothing was given. InputError: inputs that do not fit the contract.
    """
    if given is None:
        raise UsageError(
            "a plain module is calibrated by examples of its inputs",
            remedy="give calibration=[inputs, ...] or a path of .npz files, or use --quant rtn or int8, which need none",
        )
    names = [spec.name for spec in contract.inputs]
    calls = (
        read_batches(given, contract, folder)
        if isinstance(given, Path)
        else map(functools.partial(_call, names), _items(given))
    )
    fixed = next((spec.dims[0] for spec in contract.inputs if spec.dims), 1)
    size, batches, rows = fixed if isinstance(fixed, int) else _ROWS, [], 0
    for call in calls:
        arrays = call.inputs if isinstance(call, Batch) else call
        held = min((len(array) for array in arrays.values() if array.ndim), default=1)
        for start in range(0, held if isinstance(fixed, str) else held - held % size, size):
            if rows >= samples:
                break
            part = {name: array[start : start + size] if array.ndim else array for name, array in arrays.items()}
            tensors = zip(contract.inputs, map(torch.from_numpy, checked_inputs(contract, part)), strict=True)
            batches.append(tuple(tensor.to(getattr(torch, spec.dtype)) for spec, tensor in tensors))
            rows += size
    if not batches:
        raise InputError(
            "there is not one example to calibrate on",
            why=f"a call of the module takes {size} rows",
            remedy="give more rows",
        )
    return Calibration(Examples(tuple(batches)), str(given) if isinstance(given, Path) else "given inputs")


def _items(given: Any) -> Iterable[Any]:
    return [given] if isinstance(given, torch.Tensor) else given


def _call(names: Sequence[str], item: Any) -> dict[str, Array]:
    """The inputs of a call by name."""
    if not isinstance(item, Mapping):
        values = item if isinstance(item, tuple | list) else (item,)
        if len(values) != len(names):
            raise InputError(
                f"an example has {len(values)} inputs, the module takes {len(names)}", remedy=", ".join(names)
            )
        item = dict(zip(names, values, strict=True))
    return {str(name): as_array(value) for name, value in item.items()}

"""Calibration: the token sequences that statistics of activations are taken from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from optc.compiler.calibration.dataset_rows import is_dataset, read_rows
from optc.compiler.diagnostics import InputError, os_errors

DEFAULT_SAMPLES, DEFAULT_LENGTH = 128, 512
_SHORTEST = 16  # tokens of a sequence: below this, attention has nothing to look at


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Calibration:
    """Token sequences of one length.

    Attributes:
        tokens: int64 [samples, length].
        source: what they were cut from, for people.
    """

    tokens: Tensor
    source: str = ""

    @property
    def digest(self) -> str:
        """sha256 of shape and tokens: equal digests calibrate alike."""
        data = self.tokens.contiguous().numpy().tobytes()
        return hashlib.sha256(str(tuple(self.tokens.shape)).encode() + data).hexdigest()

    def __repr__(self) -> str:
        samples, length = self.tokens.shape
        return f"Calibration({samples} x {length} tokens of {self.source}, {self.digest[:12]})"


def read_documents(path: Path, encoder: Encoder | None, *, kind: str = "calibration") -> list[list[int]]:
    """The token sequences of a file of text or tokens.

    `.jsonl`: one object per line with "text" (needs a tokenizer), or "tokens" or "input_ids", a list of ids. `.json`: a
    list of ids, or a list of such lists. `.parquet`, or a folder by `datasets.save_to_disk`: the same keys as columns
    (extra `datasets`). Anything else is UTF-8 text.

    Args:
        kind: what the file is for, as errors name it.

    Raises:
        InputError: unreadable, malformed (with the line), or text without a tokenizer.
        UsageError: a dataset without the extra.
    """
    if is_dataset(path):
        return [
            _record(row, f"{path}, row {number}", encoder, kind)
            for number, row in enumerate(read_rows(path, kind=kind), 1)
        ]
    with os_errors(f"reading the {kind} file", str(path)):
        data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the {kind} file is not UTF-8", where=str(path), why=str(error)) from error
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [
            _record(_json(line, f"{path}:{number}", kind), f"{path}:{number}", encoder, kind)
            for number, line in lines
        ]
    if path.suffix == ".json":
        rows = _json(text, str(path), kind)
        if isinstance(rows, list) and rows and isinstance(rows[0], int):
            rows = [rows]
        if not isinstance(rows, list):
            raise _malformed(str(path), kind)
        return [_ids(row, str(path), kind) for row in rows]
    return [_encode(text, str(path), encoder, kind)]


def cut_sequences(
    documents: list[list[int]], *, samples: int, length: int, vocab_size: int, seed: int, source: str
) -> Calibration:
    """Cut sequences of `length` tokens at random places of the documents, without overlap where there is room.

    The documents are laid end to end and cut into pieces of `length`; `samples` of the pieces are drawn with
    `seed`. With fewer pieces than samples, all are taken.

    Raises:
        InputError: not one piece of `length` tokens, or a token outside the vocabulary.
    """
    stream = [token for document in documents for token in document]
    if not stream or length < _SHORTEST or len(stream) < length:
        raise InputError(
            f"the calibration text is too short: {len(stream)} tokens, and one sequence takes {length}",
            where=source,
            why=f"a sequence has at least {_SHORTEST} tokens" if length < _SHORTEST else None,
            remedy="give a longer text, or shorter sequences with --calibration-seq-len",
        )
    low, high = min(stream), max(stream)
    if vocab_size and (low < 0 or high >= vocab_size):
        bad = high if high >= vocab_size else low
        raise InputError(
            f"calibration token {bad} is outside the vocabulary of {vocab_size}",
            where=f"{source}, token number {stream.index(bad)}",
            remedy="encode the text with the model's own tokenizer",
        )
    count = len(stream) // length
    pieces = torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return Calibration(pieces[order].contiguous(), source)


def random_calibration(vocab_size: int, *, samples: int, length: int, seed: int) -> Calibration:
    """Random tokens, for models without a tokenizer (random weights: speed and plumbing only)."""
    generator = torch.Generator().manual_seed(seed)
    return Calibration(torch.randint(0, vocab_size, (samples, length), generator=generator), "random tokens")


def _json(text: str, where: str, kind: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"the {kind} file is not JSON", where=where, why=str(error)) from error


def _record(row: Any, where: str, encoder: Encoder | None, kind: str) -> list[int]:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return _encode(row["text"], where, encoder, kind)
    if isinstance(row, dict):
        row = row.get("tokens", row.get("input_ids"))
    return _ids(row, where, kind)


def _encode(text: str, where: str, encoder: Encoder | None, kind: str) -> list[int]:
    if encoder is None:
        raise InputError(
            f"{kind} text needs a tokenizer, and the model has none",
            where=where,
            remedy='give token ids: lines of {"tokens": [...]} in a .jsonl file',
        )
    return encoder.encode(text)


def _ids(row: Any, where: str, kind: str) -> list[int]:
    if not isinstance(row, list) or not all(
        isinstance(item, int) and not isinstance(item, bool) for item in row
    ):
        raise _malformed(where, kind)
    return row


def _malformed(where: str, kind: str) -> InputError:
    return InputError(
        f"the {kind} file holds neither text nor lists of token ids",
        where=where,
        remedy='write text, or lines of {"text": "..."} or {"tokens": [1, 2, 3]} in a .jsonl file',
    )

"""Calibration: the token sequences that statistics of activations are taken from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from optc.compiler.calibration.examples import Examples
from optc.compiler.diagnostics import InputError

_SHORTEST = 16  # tokens of a sequence: below this, attention has nothing to look at


@dataclass(frozen=True)
class Calibration:
    """Token sequences of one length; of a plain module its inputs.

    Attributes:
        tokens: int64 [samples, length], or `Examples`.
        source: what they were cut from, for people.
    """

    tokens: Tensor | Examples
    source: str = ""

    @property
    def digest(self) -> str:
        """sha256 of shape and tokens: equal digests calibrate alike."""
        if isinstance(self.tokens, Examples):
            return hashlib.sha256(self.tokens.data()).hexdigest()
        data = self.tokens.contiguous().numpy().tobytes()
        return hashlib.sha256(str(tuple(self.tokens.shape)).encode() + data).hexdigest()

    def __repr__(self) -> str:
        if isinstance(self.tokens, Examples):
            return f"Calibration({self.tokens.numel()} rows of {self.source}, {self.digest[:12]})"
        samples, length = self.tokens.shape
        return f"Calibration({samples} x {length} tokens of {self.source}, {self.digest[:12]})"


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

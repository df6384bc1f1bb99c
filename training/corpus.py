"""The documents of training files, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate
from optc.runtime.generation.tokenizer import Tokenizer
from optc.training.examples import Example, read_examples


class Corpus(NamedTuple):
    """Documents.

    Attributes:
        documents: token ids, int64 vectors.
        learned: for each document which tokens are learned, a vector of bool; None of all.
    """

    documents: list[Tensor]
    learned: list[Tensor | None]


def read_corpus(
    paths: Sequence[str],
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    end_token: int | None,
    template: ChatTemplate | None = None,
    kind: str = "training",
) -> Corpus:
    """The documents of some files, each ending with `end_token` where one is given (conversations end by their template).

    Args:
        kind: what the files are for, as errors name it.

    Raises:
        InputError: no file, one that is missing or malformed, or a token outside the vocabulary.
    """
    corpus = Corpus([], [])
    for path in text_files(paths, kind):
        for number, example in enumerate(read_examples(path, tokenizer, template), 1):
            tokens, learned = document_of(example, f"{path}, document {number}", vocab_size, end_token)
            corpus.documents.append(tokens)
            corpus.learned.append(learned)
    return corpus


def text_files(paths: Sequence[str], kind: str) -> Iterator[Path]:
    """The files, each looked for when its turn comes.

    Raises:
        InputError: there is none, or one is missing.
    """
    if not paths:
        raise InputError(
            f"no {kind} text", remedy="give --text FILE (text, .jsonl or .json), or data.text in the recipe"
        )
    for path in paths:
        if not Path(path).exists():
            raise InputError(
                f"the {kind} text does not exist",
                where=path,
                remedy="give a file (text, .jsonl, .json of token ids, .parquet) or a folder of datasets' save_to_disk",
            )
        yield Path(path)


def document_of(example: Example, where: str, vocab_size: int, end_token: int | None) -> tuple[Tensor, Tensor | None]:
    """Tokens of an example with its end, and which of them are learned (None: all).

    Raises:
        InputError: a token outside the vocabulary.
    """
    tokens, learned, ends = example
    if end_token is not None and ends and tokens and tokens[-1] != end_token:
        tokens = [*tokens, end_token]
        learned = None if learned is None else [*learned, True]
    found = torch.tensor(tokens, dtype=torch.int64)
    if len(found) and (int(found.min()) < 0 or int(found.max()) >= vocab_size):
        bad = int(found.max()) if int(found.max()) >= vocab_size else int(found.min())
        raise InputError(
            f"token {bad} is outside the vocabulary of {vocab_size}",
            where=where,
            remedy="encode the text with the model's own tokenizer",
        )
    return found, None if learned is None else torch.tensor(learned, dtype=torch.bool)

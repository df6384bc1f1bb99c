"""The share of a text that is held out of training as its validation set."""

from __future__ import annotations

import torch

from optc.compiler.diagnostics import InputError
from optc.training.corpus import Corpus


def hold_out(corpus: Corpus, share: float, *, seq_len: int, seed: int) -> tuple[Corpus, Corpus]:
    """(what is trained on, what is held out).

    Whole documents are drawn with the seed until the share is reached. The one that would exceed it is cut, its last rows
    being held out, if it is longer than they are: so a single book is held out at its end.

    Args:
        share: of all tokens, from 0 to 1.
        seq_len: tokens of a row: the unit in which a document is cut.

    Raises:
        InputError: so little text that nothing is left to train on, or nothing is held out.
    """
    order = torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = share * sum(map(len, corpus.documents))
    held: set[int] = set()
    cut: dict[int, int] = {}  # document -> where its part that is held out begins
    for number in order:
        size = len(corpus.documents[number])
        rows = round(wanted / seq_len) or (0 if held else 1)
        if size <= wanted:
            held.add(number)
            wanted -= size
            continue
        if 0 < rows * seq_len < size - 1:
            cut[number] = size - rows * seq_len
        elif not held:
            held.add(number)
        break
    kept, apart = Corpus([], []), Corpus([], [])
    for number, (tokens, learned) in enumerate(zip(*corpus, strict=True)):
        place = 0 if number in held else cut.get(number, len(tokens))
        for part, piece in ((kept, slice(0, place)), (apart, slice(place, None))):
            if len(tokens[piece]):
                part.documents.append(tokens[piece])
                part.learned.append(None if learned is None else learned[piece])
    if not kept.documents or not apart.documents:
        raise InputError(
            f"a share of {share:g} cannot be held out of {len(corpus.documents)} document(s)",
            why=f"they have {sum(map(len, corpus.documents))} tokens, and a row takes {seq_len}",
            remedy="give a longer text, or a validation set of its own by --validation",
        )
    return kept, apart

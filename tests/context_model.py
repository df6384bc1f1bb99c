"""A paged program without weights: the next token is a function of all tokens before it, as they are found in the pool.

A wrong slot, table, position or length gives another token, and it takes next to no time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optc.runtime.sessions.paged import PagedModel

VOCAB = 61


def next_token(tokens: Sequence[int]) -> int:
    """A hash of the tokens in their order."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def continuation(prompt: Sequence[int], count: int, stops: Sequence[int] = ()) -> list[int]:
    """What a request gets."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def run(
    ids: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, lengths: Tensor, starts: Tensor, *rest: Tensor
) -> Tensor:
    """Logits [N, V]; padding (slot -1) is left alone, and its logits are 0."""
    pool = rest[-1]
    flat, size = pool.view(-1), pool.shape[1]
    real = slots >= 0
    flat[slots[real]] = ids[real]
    logits = torch.zeros((len(ids), VOCAB))
    bounds = starts.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if not bool(real[begin:end].all()):
            continue
        length = int(lengths[row])
        assert positions[begin:end].tolist() == list(range(length - (end - begin), length))
        at = torch.arange(length)
        held = flat[tables[row].long()[at // size] * size + at % size].tolist()
        for token in range(begin, end):
            logits[token, next_token(held[: length - (end - 1 - token)])] = 1.0
    return logits


def context_model(
    num_blocks: int, block_size: int = 4, context: int = 64, *, wrap: Callable[..., Tensor] = run
) -> PagedModel:
    """The program with an empty pool."""
    return PagedModel(
        run=wrap,
        pools=[torch.full((num_blocks, block_size), -1, dtype=torch.int64)],
        selects=False,
        vocab_size=VOCAB,
        context_length=context,
        block_size=block_size,
        num_blocks=num_blocks,
        chunk=4096,
        device=torch.device("cpu"),
    )

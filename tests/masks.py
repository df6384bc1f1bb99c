"""Attention masks made at random from comparisons of positions, padding and logic."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_COMPARISONS = (operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne)


@dataclass(frozen=True)
class Places:
    """What a mask is made from: positions of queries [S, 1] and keys [1, S], and `pad` bool [B, S]."""

    query: Tensor
    key: Tensor
    pad: Tensor

    @classmethod
    def of(cls, pad: Tensor) -> Places:
        positions = torch.arange(pad.shape[1])
        return cls(positions[:, None], positions[None, :], pad)


Maker = Callable[[Places], Tensor]


def random_mask(source: random.Random, depth: int = 2) -> Maker:
    """A random mask: bool, broadcast to [B, 1, S, S]."""
    if depth == 0 or source.random() < 0.3:
        return _random_atom(source)
    kind = source.choice(("and", "and", "and", "or", "not", "where", "differs"))
    a, b, c = (random_mask(source, depth - 1) for _ in range(3))
    made: dict[str, Maker] = {
        "and": lambda places: a(places) & b(places),
        "or": lambda places: a(places) | b(places),
        "not": lambda places: ~a(places),
        "where": lambda places: torch.where(a(places), b(places), c(places)),
        "differs": lambda places: a(places) != b(places),
    }
    return made[kind]


def _random_atom(source: random.Random) -> Maker:
    compare, shift, scale = source.choice(_COMPARISONS), source.randint(-3, 3), source.choice((1, 1, 2))
    number = source.randint(0, 6)
    atoms: list[Maker] = [
        lambda places: places.key <= places.query,
        lambda places: places.key > places.query - number,
        lambda places: compare(places.key * scale, places.query * scale + shift),
        lambda places: compare(places.query - places.key, shift),
        lambda places: torch.ones_like(places.key - places.query, dtype=torch.bool).tril(shift),
        lambda places: torch.ones_like(places.key - places.query, dtype=torch.bool).triu(shift),
        lambda places: places.pad[:, None, None, :],
        lambda places: ~places.pad[:, None, None, :],
        lambda places: places.pad[:, None, :, None],
        lambda places: compare(places.key, number),
        lambda places: compare(places.key + places.query, number),
    ]
    weights = [4, 3, 2, 2, 1, 1, 3, 1, 0.3, 0.3, 0.3]
    return source.choices(atoms, weights)[0]


ADDITIVE: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda keep: torch.where(keep, 0.0, float("-inf")),
    lambda keep: (1.0 - keep.float()) * torch.finfo(torch.float32).min,
    lambda keep: torch.zeros_like(keep, dtype=torch.float32).masked_fill(~keep, -1e9),
)
"""A bool mask as a number that is added to scores."""

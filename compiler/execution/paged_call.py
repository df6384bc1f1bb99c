"""How tokens of requests are laid out in a call of a paged program: for sessions, models that draft, and engines alike."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Tables = npt.NDArray[np.int32]


class Layout(NamedTuple):
    """N new tokens of R requests, end to end.

    Attributes:
        owner: int64 [N], the request of each token.
        positions: int64 [N], in its request. slots: int64 [N], in the pool (block * block_size + offset).
        tables: int32 [R, MB], blocks of each request; what fills up a row is not read.
        lengths: int32 [R], tokens with the new ones.
        bounds: int32 [R + 1], where the tokens of each request begin; at last N.
    """

    owner: Ints
    positions: Ints
    slots: Ints
    tables: Tables
    lengths: Tables
    bounds: Tables


def lay_out(starts: Ints, counts: Ints, tables: Tables, block_size: int) -> Layout:
    """The layout of a call.

    Args:
        starts: int64 [R], tokens that each request has in the pool. counts: int64 [R], those that it is fed, 1 at least.
        tables: int32 [R, MB], with the blocks of all of them.
    """
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    owner = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(bounds[-1]) + (starts - bounds[:-1])[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    lengths = (starts + counts).astype(np.int32)
    return Layout(owner, positions, slots, tables, lengths, bounds.astype(np.int32))

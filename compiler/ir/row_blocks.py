"""Blocks of rows that fit the processor's cache, for arithmetic on whole weights that makes several temporaries."""

from __future__ import annotations

BLOCK = 1 << 17
"""Numbers in a block: 512 KB of float32 each for a handful of temporaries. Larger ones would come from the system, page
by page (see `stored_weights.return_freed_memory`), at several times the cost of the arithmetic."""


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """(begin, end) of consecutive blocks of the rows of a matrix [rows, columns]."""
    step = max(1, BLOCK // max(1, columns))
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]

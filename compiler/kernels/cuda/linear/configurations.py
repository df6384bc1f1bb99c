"""Which kernel multiplies how many tokens, and its tile sizes: from tables that were measured on a card.

`benchmarks/gpu_linears.py` measures and writes `configurations.json`. A shape that is not in it takes the tile sizes of
the nearest one that is.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

Kind = Literal["gemv", "product"]
FILE_NAME = "configurations.json"
_FEW, _READS = 8, 10 << 20
"""Tokens up to which a weight of floats is read once for each, where those are no more numbers in all: caches hold it then,
and what a launch takes, and the norm's, is more than the reading."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A linear as the tables know it.

    Attributes:
        format: of the weight; "" for the type of the tokens.
        n: results per token. k: columns of the weight. gated: it has 2 n rows.
        m: tokens.
    """

    format: str
    n: int
    k: int
    gated: bool
    m: int = 1

    def distance(self, other: Shape) -> float:
        """How far the tile sizes of another shape are from fitting; its format must be the same."""
        columns, rows, tokens = (
            abs(math.log2(a / b)) for a, b in ((self.k, other.k), (self.n, other.n), (self.m, other.m))
        )
        return 4 * columns + rows + 4 * tokens + (2 if self.gated != other.gated else 0)


@dataclass(frozen=True, kw_only=True)
class Gemv:
    """Tile sizes of a GEMV.

    Attributes:
        block_n: rows of results in a tile. steps: tiles of rows per program.
        width: columns of a tile; of integers, words of 32 bits.
        depth: tiles that are loaded ahead. warps: per program.
        unrolled: of integers, whether the code has each of a program's turns.
        early: the next kernel may start at once; else when the first loads of this one are under way. See
            `primitives.let_next_start`.
    """

    block_n: int
    steps: int
    width: int
    depth: int
    warps: int
    unrolled: bool = False
    early: bool = False

    def fitted(self, row: int, per_warp: int = 1) -> Gemv:
        """For a row of so many columns or words: tiles no wider than it, but with `per_warp` of them for each warp."""
        width = max(min(self.width, 1 << (row - 1).bit_length()), per_warp)
        steps = self.steps if width >= row else 1
        return replace(self, width=width, steps=steps, warps=min(self.warps, width // per_warp))


@dataclass(frozen=True, kw_only=True)
class Product:
    """Tile sizes of a product on the tensor cores.

    Attributes:
        block_n: rows of results per program. split: programs that share the columns.
        stages: of the pipeline of loads. warps: per program.
        block_k: columns per step; integers take a group per step instead.
        lines: of 128 bytes of each row that a program asks for before it waits for its tokens, a power of two; 0 for none,
            and the next kernel starts later then.
        joined: of integers, both digits of the tokens are multiplied at once.
        registers: of a thread at most, so that more programs run at a time; 0 for no limit.
    """

    block_n: int
    split: int
    stages: int
    warps: int
    block_k: int = 0
    lines: int = 0
    joined: bool = False
    registers: int = 0


@dataclass(frozen=True)
class Tables:
    """What was measured.

    Attributes:
        limits: from formats to the most tokens that each kernel is the fastest for.
    """

    limits: dict[str, dict[Kind, int]]
    gemv: tuple[tuple[Shape, Gemv], ...]
    product: tuple[tuple[Shape, Product], ...]


@functools.cache
def tables() -> Tables:
    """The tables of this package."""
    return parse(json.loads((resources.files(__package__) / FILE_NAME).read_text()))


def parse(content: dict[str, Any]) -> Tables:
    """Tables from their JSON form: a list of records per kernel, each a shape and its `tiles`."""
    gemv = tuple((_shape(record), Gemv(**record["tiles"])) for record in content["gemv"])
    product = tuple((_shape(record), Product(**record["tiles"])) for record in content["product"])
    return Tables(content["limits"], gemv, product)


def _shape(record: dict[str, Any]) -> Shape:
    return Shape(**{name: record[name] for name in ("format", "n", "k", "gated", "m")})


@functools.cache
def kind_for(shape: Shape) -> Kind | None:
    """The kernel for as many tokens; None where dequantizing for cuBLAS is faster."""
    limits = tables().limits[shape.format]
    reads = shape.m * shape.k * shape.n * (2 if shape.gated else 1)
    if shape.m <= limits["gemv"] or (not shape.format and shape.m <= _FEW and reads <= _READS):
        return "gemv"
    return "product" if shape.m <= limits["product"] else None


@functools.cache
def gemv_tiles(shape: Shape) -> Gemv:
    """Of the nearest shape."""
    return min((item for item in tables().gemv if item[0].format == shape.format), key=lambda i: shape.distance(i[0]))[
        1
    ]


@functools.cache
def product_tiles(shape: Shape) -> Product:
    """Of the nearest shape."""
    found = (item for item in tables().product if item[0].format == shape.format)
    return min(found, key=lambda item: shape.distance(item[0]))[1]

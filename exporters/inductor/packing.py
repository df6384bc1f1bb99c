"""Whether weights of a graph that computes one row, such as a decode step, should be packed for MKL.

Inductor's freezing packs the weights of linears, which saves a matrix product of many rows from doing so in each call. A row
needs no packing: plain products read the weight once, as they lie. Which is faster differs by processor (a decode step of 113M
in float32: packed 0.96 of the plain one's speed on a Xeon, 1.13 on an EPYC), so both are timed on the graph's own weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.convolutions import CONVOLUTIONS
from optc.compiler.ir.program import Program

_aten = torch.ops.aten
_LINEAR = _aten.linear.default
_SAMPLES = 4
"""Weights of a shape that are timed, one after the other: those of one layer would stay in the cache."""
_ROUNDS = 5


def packing_pays(program: Program) -> bool:
    """Whether Inductor should pack the weights of a program: yes, unless it has linears of one row in float32 and neither
    other linears nor convolutions, and plain products of its weights are faster here."""
    shapes = _one_row_weights(program)
    return not shapes or not torch._C.has_mkl or _is_faster_packed(shapes)


def _one_row_weights(program: Program) -> dict[tuple[int, ...], list[Tensor]]:
    """The weights [N, K] of all linears by shape; empty where one has other rows or type, or there are convolutions."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    if program.calls(*CONVOLUTIONS):
        return {}
    for node in program.calls(_LINEAR):
        weight = _weight(program, node.args[1])
        rows = math.prod(node.args[0].meta["val"].shape[:-1])
        if weight is None or weight.dtype is not torch.float32 or not isinstance(rows, int) or rows != 1:
            return {}
        found.setdefault(tuple(weight.shape), []).append(weight)
    return found


def _weight(program: Program, node: object) -> Tensor | None:
    name = program.weight_of(node) if isinstance(node, Node) else None
    return None if name is None else program.weight(name)


def _is_faster_packed(shapes: dict[tuple[int, ...], list[Tensor]]) -> bool:
    plain = packed = 0.0
    with torch.no_grad():
        for (_, width), weights in shapes.items():
            x, some = torch.ones(1, width), weights[:_SAMPLES]
            reordered = [torch.ops.mkl._mkl_reorder_linear_weight(weight, 1) for weight in some]

            def plain_products(x: Tensor = x, some: list[Tensor] = some) -> None:
                for weight in some:
                    torch.mm(x, weight.t())

            def packed_products(x: Tensor = x, some: list[Tensor] = some, reordered: list[Tensor] = reordered) -> None:
                for weight, other in zip(some, reordered, strict=True):
                    torch.ops.mkl._mkl_linear(x, other, weight, None, 1)

            share = len(weights) / len(some)
            first, second = _fastest(plain_products, packed_products)
            plain, packed = plain + share * first, packed + share * second
    return packed <= plain


def _fastest(*calls: Callable[[], None]) -> list[float]:
    """The least seconds of each call, in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(_ROUNDS):
        for place, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - begin)
    return best

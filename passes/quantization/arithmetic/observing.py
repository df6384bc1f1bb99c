"""Ranges of activations over calibration data, and grids of 8-bit codes for them.

The program runs batch by batch as it is, and only its statistics are kept: the ends of each tensor in a first round, and
in a second one a histogram between them, for ranges that leave the farthest values out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.calibration.examples import Examples
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.program import Program
from optc.passes.quantization.arithmetic.ranges import check_finite
from optc.passes.quantization.arithmetic.stream import BATCH_TOKENS, Stream

LEVELS = 255
"""Steps between the first code and the last."""
RangeMethod = Literal["minmax", "mse", "percentile"]

_BINS = 2048
_SHARES = torch.linspace(1.0, 0.1, 91, dtype=torch.float64)
"""Shares of the largest value that are tried as the end of a range."""
_ROUNDS = 3


@dataclass(frozen=True)
class Grid:
    """Codes 0 to 255 of a tensor: value = (code - zero) * scale; the scale is a float32 number."""

    scale: float
    zero: int


def observed_ranges(
    program: Program,
    feed: Tensor | Examples,
    nodes: Sequence[Node],
    method: RangeMethod,
    percentile: float,
    progress: Callable[[int, int, str], None],
) -> dict[Node, tuple[float, float]]:
    """(lowest, highest) value that the codes of each node shall reach.

    Args:
        nodes: in graph order.
        method: minmax: all values. mse: the range whose rounding errors and clipping together are least, squared (as in
            Banner et al. 2018, https://arxiv.org/abs/1810.05723, but of the histogram itself). percentile: all but the
            share 1 - percentile / 100 of the values, at either end.

    Raises:
        InputError: activations that are not finite (the node is named), or no calibration rows.
    """
    ends: dict[Node, tuple[float, float]] = {}
    for node, value in _values(program, feed, nodes, lambda done, total: progress(done, total, "ranges")):
        if value.numel():
            span = torch.stack(value.aminmax())
            check_finite(span, node.name)
            before = ends.get(node, (math.inf, -math.inf))
            ends[node] = (min(before[0], float(span[0])), max(before[1], float(span[1])))
    missing = next((node for node in nodes if node not in ends), None)
    if missing is not None:
        raise InputError("no calibration row reaches a layer", where=missing.name, remedy="give more rows")
    if method == "minmax":
        return ends
    counts = {node: torch.zeros(_BINS, dtype=torch.float64) for node in nodes}
    for node, value in _values(program, feed, nodes, lambda done, total: progress(done, total, "histograms")):
        low, high = ends[node]
        if low < high:
            counts[node] += torch.histc(value.float().cpu(), _BINS, low, high).double()
    choose = _least_error if method == "mse" else _inner_share
    return {
        node: choose(counts[node], *ends[node], percentile) if ends[node][0] < ends[node][1] else ends[node]
        for node in nodes
    }


def grid_of(low: float, high: float, bound: float | None) -> Grid:
    """The grid that reaches from `low` to `high` and has 0, which padding is, among its values.

    Args:
        bound: of a tensor clipped at zero, the most that it can be: codes then do the clipping. None for others.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if bound is not None:
        low, high = 0.0, min(high, bound)
    scale = torch.tensor((high - low) / LEVELS, dtype=torch.float32).clamp(
        min=torch.finfo(torch.float32).smallest_normal
    )
    if bound is not None and float(scale) * LEVELS > bound:
        scale = torch.nextafter(scale, torch.zeros(()))
    step = float(scale)
    return Grid(step, min(LEVELS, max(0, round(-low / step))))


def _values(
    program: Program, feed: Tensor | Examples, nodes: Sequence[Node], tell: Callable[[int, int], None]
) -> Iterator[tuple[Node, Tensor]]:
    """The values of nodes, batch by batch."""
    parts = list(_parts(feed))
    with torch.no_grad():
        for number, part in enumerate(parts):
            tell(number, len(parts))
            stream = Stream(program, part)
            for node in nodes:
                stream.advance(node)
                for value in stream.values(node):
                    yield node, value.detach()


def _parts(feed: Tensor | Examples) -> Iterator[Tensor | Examples]:
    if isinstance(feed, Examples):
        yield from (Examples((inputs,)) for inputs in feed.batches)
    else:
        yield from feed.split(max(1, BATCH_TOKENS // feed.shape[1]))


def _inner_share(counts: Tensor, low: float, high: float, percentile: float) -> tuple[float, float]:
    """The ends of the bins between which all but a share of the values lies, that share at either end."""
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    left = float(counts.sum()) * (1.0 - percentile / 100.0)
    first = int((counts.cumsum(0) <= left).sum())
    last = int((counts.flip(0).cumsum(0) <= left).sum())
    return float(edges[min(first, _BINS - 1)]), float(edges[max(_BINS - last, first + 1)])


def _least_error(counts: Tensor, low: float, high: float, _: float) -> tuple[float, float]:
    """The range of the least squared error of a histogram, one end after the other."""
    width = (high - low) / _BINS
    centers = low + width * (torch.arange(_BINS, dtype=torch.float64) + 0.5)
    low, high = min(low, 0.0), max(high, 0.0)
    for _round in range(_ROUNDS):
        before = low, high
        if high > 0:
            tops = high * _SHARES
            high = float(tops[_errors(counts, centers, torch.full_like(tops, low), tops).argmin()])
        if low < 0:
            bottoms = low * _SHARES
            low = float(bottoms[_errors(counts, centers, bottoms, torch.full_like(bottoms, high)).argmin()])
        if (low, high) == before:
            break
    return low, high


def _errors(counts: Tensor, centers: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Squared errors of values under grids from low [n] to high [n]; [n]."""
    step = ((high - low) / LEVELS)[:, None]
    zero = (-low[:, None] / step).round()
    rounded = ((centers / step).round() + zero).clamp(0, LEVELS)
    return (((rounded - zero) * step - centers).square() * counts).sum(-1)

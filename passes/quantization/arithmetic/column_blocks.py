"""The sequential part of GPTQ: rounding a block of columns one after the other.

Each column is a few small operations. On a GPU launching them costs more than computing them, so the whole block is
recorded once as a CUDA graph per shape and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WARM_UP = 2
Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def round_block(
    block: Tensor, target: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    """Round C columns of a weight in order, moving each one's error to the next.

    Args:
        block: [C, N], columns as rows.
        target: [C, N], the block with what earlier columns ask of it; changed in place.
        upper: [C, C], the block of `Factor.upper`.
        scale, zero: [C, N], the grid of each column.
        top: the largest code.

    Returns:
        codes [C, N], and gaps [C, N]: what rounding took away from `block`.
    """
    codes, gaps = torch.empty_like(block), torch.empty_like(block)
    count = len(block)
    columns = zip(*(item.unbind() for item in (block, target, scale, zero, codes, gaps)), strict=True)
    for i, (column, wanted, step, middle, code, gap) in enumerate(columns):
        torch.div(wanted, step, out=code).add_(middle).round_().clamp_(0, top)
        torch.sub(code, middle, out=gap).mul_(step)
        torch.sub(column, gap, out=gap)
        if i + 1 < count:
            target[i + 1 :].addr_(upper[i, i + 1 :], gap)
    return codes, gaps


@dataclass
class _Recorded:
    inputs: Block
    outputs: tuple[Tensor, Tensor]
    graph: torch.cuda.CUDAGraph


class BlockRounder:
    """`round_block`, replayed from CUDA graphs where the weight is on a GPU."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[int, int, float, torch.device], _Recorded] = {}

    def __call__(
        self, block: Tensor, target: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: float
    ) -> tuple[Tensor, Tensor]:
        """As `round_block`; `target` may keep its old values. The results are overwritten by the next call."""
        if block.device.type != "cuda":
            return round_block(block, target, upper, scale, zero, top)
        key = (block.shape[0], block.shape[1], top, block.device)
        given = (block, target, upper, scale, zero)
        if key not in self._recorded:
            self._recorded[key] = _record(given, top)
        held = self._recorded[key]
        for target, source in zip(held.inputs, given, strict=True):
            target.copy_(source)
        held.graph.replay()
        return held.outputs


def _record(given: Block, top: float) -> _Recorded:
    block, target, upper, scale, zero = (item.clone(memory_format=torch.contiguous_format) for item in given)
    held = (block, target, upper, scale, zero)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            round_block(*held, top)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = round_block(*held, top)
    return _Recorded(held, outputs, graph)

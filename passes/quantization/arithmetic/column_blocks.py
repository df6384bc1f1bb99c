"""The sequential part of GPTQ: rounding a block of columns one after the other.

Each column is a few small operations. On a GPU launching them costs more than computing them, so the whole block is
recorded once as a CUDA graph per shape and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WARM_UP = 2
Block = tuple[Tensor, Tensor, Tensor, Tensor]


def round_block(block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Round C columns of a weight in order, moving each one's error to the next.

    Args:
        block: [C, N], columns as rows; changed in place.
        upper: [C, C], the block of the inverse's upper Cholesky factor.
        scale, zero: [C, N], the grid of each column.
        top: the largest code.

    Returns:
        codes [C, N], and errors [C, N], each divided by the factor's diagonal.
    """
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    count = len(block)
    for i in range(count):
        code = torch.div(block[i], scale[i]).add_(zero[i]).round_().clamp_(0, top)
        codes[i] = code
        errors[i] = code.sub_(zero[i]).mul_(scale[i]).sub_(block[i]).div_(upper[i, i])  # the error's negative
        if i + 1 < count:
            block[i + 1 :].addr_(upper[i, i + 1 :], errors[i])
    return codes, errors.neg_()


@dataclass
class _Recorded:
    inputs: Block
    outputs: tuple[Tensor, Tensor]
    graph: torch.cuda.CUDAGraph


class BlockRounder:
    """`round_block`, replayed from CUDA graphs where the weight is on a GPU."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[int, int, float, torch.device], _Recorded] = {}

    def __call__(self, block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: float) -> tuple[Tensor, Tensor]:
        """As `round_block`; `block` may keep its old values. The results are overwritten by the next call."""
        if block.device.type != "cuda":
            return round_block(block, upper, scale, zero, top)
        key = (block.shape[0], block.shape[1], top, block.device)
        given = (block, upper, scale, zero)
        if key not in self._recorded:
            self._recorded[key] = _record(given, top)
        held = self._recorded[key]
        for target, source in zip(held.inputs, given, strict=True):
            target.copy_(source)
        held.graph.replay()
        return held.outputs


def _record(given: Block, top: float) -> _Recorded:
    block, upper, scale, zero = (item.clone(memory_format=torch.contiguous_format) for item in given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            round_block(block, upper, scale, zero, top)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = round_block(block, upper, scale, zero, top)
    return _Recorded((block, upper, scale, zero), outputs, graph)

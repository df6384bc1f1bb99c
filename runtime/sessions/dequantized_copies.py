"""Dequantized copies of a program's packed weights on a GPU, for as many as memory has room for.

A product of more tokens than the integer kernels are fastest for dequantizes its weight first, each time. Steps of a busy
server are such products: with copies they cost what they do in the type that is computed in, and steps of few requests
still read the packed weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.ir.program import Program


def keep_copies(program: Program, room: int) -> int:
    """Make copies, in graph order, of packed weights that fit into `room` bytes; what they take.

    They go when the program's weights do. Weights whose products take codes of the tokens need none.
    """
    from optc.compiler.kernels.cuda.linear.dequantized import dequantized, keep  # imports triton

    kept = 0
    for node in program.calls(torch.ops.optc.fused_linear.default):
        format, group = node.kwargs.get("format", ""), node.kwargs.get("group_size", 0)
        if not format or node.kwargs.get("inputs"):
            continue
        x = value_of(node.args[0])
        weight, scale, zero = (_weight(program, item) for item in node.args[1:4])
        assert weight is not None
        assert scale is not None
        columns, dtype = x.shape[-1], x.dtype
        size = weight.shape[0] * columns * dtype.itemsize
        if kept + size > room:
            continue
        copy = dequantized(
            weight,
            scale,
            zero,
            columns=columns,
            format=format,
            group_size=0 if group == columns else group,
            dtype=dtype,
        )
        keep(weight, copy)
        kept += size
    return kept


def _weight(program: Program, node: object) -> Tensor | None:
    name = program.weight_of(node)
    return None if name is None else program.weight(name)

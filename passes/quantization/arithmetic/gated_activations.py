"""hard-swish and SiLU of codes as a product of codes, x * gate(x), for which engines have integer kernels.

hardswish(x)  ->  x * (codes of min(max(x + 3, 0), 6), read with a sixth of their scale)
silu(x)       ->  x * (codes of sigmoid(x))

A sum clips by the range of its codes, a sigmoid of codes is a table; in floating point each of them reads and writes four
times as many bytes, three times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call, replace_call
from optc.compiler.rewriting.weights import record_weight
from optc.passes.quantization.arithmetic.observing import LEVELS, Grid, grid_of

_optc = torch.ops.optc
GATED = frozenset((aten.hardswish.default, aten.silu.default))
_SHIFT, _TOP = 3.0, 6.0
"""hardswish(x) = x * min(max(x + 3, 0), 6) / 6."""


def spell_gates(program: Program, calls: Sequence[Node]) -> None:
    """Put the product in place of every hard-swish and SiLU among calls that read dequantized tensors."""
    shift: Node | None = None
    for node in calls:
        if node.target not in GATED:
            continue
        x = node.args[0]
        assert isinstance(x, Node)
        if node.target is aten.silu.default:
            gate = _coded(program, node, insert_call(program, node, aten.sigmoid.default, (x,)), grid_of(0.0, 1.0, 1.0))
        else:
            shift = shift or _constant(program)
            moved = insert_call(
                program, node, aten.add.Tensor, (x, _back(program, node, shift, Grid(_step(_SHIFT), 0)))
            )
            gate = _coded(program, node, moved, grid_of(0.0, _TOP, _TOP), factor=1.0 / _TOP)
        replace_call(program, node, aten.mul.Tensor, (x, gate))


def _coded(program: Program, before: Node, x: Node, grid: Grid, factor: float = 1.0) -> Node:
    """x rounded, and its numbers times a factor."""
    knobs = {"scale": grid.scale, "zero": grid.zero}
    codes = insert_call(program, before, _optc.quantize_tensor.default, (x,), knobs)
    return _back(program, before, codes, Grid(_float32(grid.scale * factor), grid.zero))


def _back(program: Program, before: Node, codes: Node, grid: Grid) -> Node:
    knobs: dict[str, Any] = {"scale": grid.scale, "zero": grid.zero, "dtype": value_of(before).dtype}
    return insert_call(program, before, _optc.dequantize_tensor.default, (codes,), knobs)


def _constant(program: Program) -> Node:
    """The last code, uint8 [1]."""
    name = "hardswish_shift_codes"
    record_weight(program, name, ())
    return add_weight(program, name, torch.tensor([LEVELS], dtype=torch.uint8))


def _step(value: float) -> float:
    """The scale with which the last code is a value."""
    return _float32(value / LEVELS)


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))

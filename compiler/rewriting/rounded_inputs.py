"""Rounded activations in a graph: the calls that make codes of a value and bring the numbers back."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call

_optc = torch.ops.optc


def rounded_input(program: Program, before: Node, x: Node, format: str, scale: Node | None = None) -> Node:
    """x, rounded to codes and brought back, in front of a node.

    Args:
        format: int8, fp8 or nvfp4.
        scale: the calibrated scale, float32 [1], or for int8 and fp8 of a shape that broadcasts to x; without it each
            token has its own.
    """
    knobs = {"dtype": value_of(x).dtype}
    if scale is not None and format != "nvfp4":
        codes = insert_call(program, before, _optc.quantize.default, (x, scale), {"format": format})
        return insert_call(program, before, _optc.dequantize_activation.default, (codes, scale), knobs)
    if scale is not None:
        made = insert_call(program, before, _optc.quantize_nvfp4.default, (x, scale))
        parts = [insert_call(program, before, operator.getitem, (made, i)) for i in (0, 1)]
        return insert_call(program, before, _optc.dequantize_nvfp4.default, (*parts, scale), knobs)
    made = insert_call(program, before, _optc.quantize_dynamic.default, (x,), {"format": format})
    parts = [insert_call(program, before, operator.getitem, (made, i)) for i in (0, 1)]
    return insert_call(program, before, _optc.dequantize_activation.default, parts, knobs)

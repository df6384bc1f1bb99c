"""Rounded activations in a graph: the calls that make codes of a value and bring the numbers back; rotated ones."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call
from optc.compiler.ops.dialect.rotation import hadamard
from optc.compiler.rewriting.weights import record_weight

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


def rotated_input(program: Program, before: Node, x: Node, size: int) -> Node:
    """x [..., K] times Sylvester's Hadamard matrix in blocks of `size` channels, in front of a node."""
    held = hadamard_weight(program, size, value_of(x).dtype, torch.device("cpu"))
    return insert_call(program, before, _optc.rotate_blocks.default, (x, held))


def hadamard_weight(program: Program, size: int, dtype: torch.dtype, device: torch.device) -> Node:
    """The matrix [size, size] as a weight of the program, in the type of its activations; one for all inputs."""
    name = f"hadamard_{size}"
    if name in program.exported.state_dict:
        return next(node for node in program.graph.nodes if program.weight_of(node) == name)
    record_weight(program, name, ())
    return add_weight(program, name, hadamard(size).to(device, dtype))


def rotation_size(program: Program, call: Node) -> int:
    """The block of a `rotate_blocks` call whose matrix is Sylvester's, 0 of any other."""
    name = program.weight_of(call.args[1])
    matrix = None if name is None else program.weight(name).detach()
    if matrix is None or len(matrix) & (len(matrix) - 1):
        return 0
    return len(matrix) if torch.equal(matrix.cpu(), hadamard(len(matrix)).to(matrix.dtype)) else 0

"""linear_nbits(x, packed, ..., activation_group=-1)  ->  linear_nbits(x, packed, ..., activation_group=g)

and the same for ONNX Runtime's kernel:

    matmul_nbits(x, packed, ..., accuracy_level=0)  ->  matmul_nbits(x, packed, ..., accuracy_level=4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import replace_call
from optc.compiler.ops.packed.inductor_cpu import KEPT, block_columns
from optc.compiler.ops.packed.onnxruntime import ROUNDS
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.passes.quantization.arithmetic.budgets import INT8_INPUTS

LINEAR = torch.ops.optc.linear_nbits.default
MATMUL = torch.ops.optc.matmul_nbits.default
_GROUPS = (128, 64, 32)


@dataclass(frozen=True, kw_only=True)
class RoundActivations(Pass):
    """linear_nbits(x, ..., activation_group=-1)  ->  linear_nbits(x, ..., activation_group=g)

    Activations are rounded to int8 in groups of up to 128 columns (ONNX Runtime: of the weight's blocks), so that packed
    products are of integers: several times faster with many rows, and somewhat with one. This is accuracy level 4;
    without the pass it is level 0.
    """

    name: ClassVar[str] = "round-activations"
    lossy: ClassVar[bool] = True

    def budget(self, before: Program) -> Budget:
        return INT8_INPUTS

    def run(self, program: Program, context: PassContext) -> PassResult:
        return apply_rules(program, [_Round(), _RoundBlocks()])


class _Round(Rule):
    """A packed product that takes activations as they are, with groups that the packed layout has already."""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not LINEAR or node.kwargs["activation_group"] != KEPT:
            return None
        if node.args[5] is not None:
            return Miss(node.name, "products with a codebook take unrounded activations")
        size = int(node.kwargs["group_size"]) or int(node.kwargs["K"])
        unit = block_columns(int(node.kwargs["bits"]))
        group = next((item for item in _GROUPS if size % item == 0 and item % unit == 0), None)
        if group is None and size <= _GROUPS[0]:
            group = size
        if group is None:
            return Miss(node.name, f"no group of {', '.join(map(str, _GROUPS))} columns divides {size}")
        return Match(node, {"group": group})

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        knobs = {**node.kwargs, "activation_group": match.found["group"]}
        replace_call(program, node, LINEAR, node.args, knobs)


class _RoundBlocks(Rule):
    """ONNX Runtime's product that takes activations as they are."""

    def match(self, program: Program, node: Node) -> Match | None:
        return Match(node) if node.target is MATMUL and node.kwargs["accuracy_level"] != ROUNDS else None

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        replace_call(program, node, MATMUL, node.args, {**node.kwargs, "accuracy_level": ROUNDS})

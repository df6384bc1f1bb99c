"""linear(x, W)  ->  linear(rotate_blocks(x, H), W H), H a Hadamard matrix over blocks of channels"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.linears import Linear
from optc.compiler.diagnostics import UsageError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, set_weight
from optc.compiler.ops.dialect.rotation import hadamard
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.rounded_inputs import hadamard_weight
from optc.passes.quantization.arithmetic.groups import Group, input_groups, rows, weight_label, weight_rows
from optc.passes.quantization.arithmetic.ranges import calibration_feed, check_finite
from optc.passes.quantization.arithmetic.scale_pass import read_elsewhere
from optc.passes.quantization.arithmetic.selection import counterpart, select_linears, weight_name
from optc.passes.quantization.arithmetic.stream import Stream

_LEAST_BLOCK = 16  # below this a turn spreads an outlier over too few channels


@dataclass(frozen=True, kw_only=True)
class RotateInputs(Pass):
    """linear(x, W)  ->  linear(rotate_blocks(x, H), W H), H a Hadamard matrix over blocks of channels

    The outputs stay the same. A token's few large entries are spread over a block of channels, so that a scale per
    token wastes fewer codes (QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, which turns the input of
    the down projection so, since no earlier weight can take the turn). Only inputs that gain are turned: the turn is
    a small matrix product at run time, K * block_size multiplications per token.

    Attributes:
        block_size: the largest block; each input gets the largest power of two up to it that divides its channels.
        least_gain: turn an input whose mean squared largest entry, which the noise of rounding grows with, falls at
            least by this factor.
        samples: calibration sequences that are read, at most; 0 is all.
        ignore, head: as the quantization that follows has them.
    """

    name: ClassVar[str] = "rotate-inputs"
    calibrated: ClassVar[bool] = True

    block_size: int = 128
    least_gain: float = 4.0
    samples: int = 32
    ignore: tuple[str, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        if self.block_size < _LEAST_BLOCK or self.block_size & (self.block_size - 1):
            raise UsageError(
                f"block size {self.block_size} is not a power of two of at least {_LEAST_BLOCK}",
                remedy="use 64, 128 or 256",
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Turn inputs in a clone of `program`; an input that gains too little is a miss with its gain.

        Raises:
            InputError: no calibration tokens, or activations that are not finite.
        """
        selection = select_linears(program, self.ignore, self.head)
        tokens = calibration_feed(self.name, context)
        groups = input_groups(selection.chosen)
        stream = Stream(program, tokens[: self.samples or None])
        turned: list[tuple[Group, Tensor]] = []
        misses: list[Miss] = []
        with torch.no_grad():
            for number, group in enumerate(groups):
                if context.progress:
                    context.progress(number, len(groups), weight_label(program, group.sites[0]))
                matrix = hadamard(math.gcd(int(value_of(group.root).shape[-1]), self.block_size))
                reason = _obstacle(program, group, matrix) or self._little_gain(stream, group, matrix)
                if reason:
                    misses += [Miss(site.node.name, reason) for site in group.sites]
                else:
                    turned.append((group, matrix))
        if not turned:
            return PassResult(program, 0, len(groups), tuple(misses))
        edited = program.clone()
        nodes = {node.name: node for node in edited.graph.nodes}
        for group, matrix in turned:
            _turn(edited, [counterpart(edited, nodes[site.node.name]) for site in group.sites], matrix)
        return PassResult(edited.changed(), len(turned), len(groups), tuple(misses))

    def _little_gain(self, stream: Stream, group: Group, matrix: Tensor) -> str:
        stream.advance(group.root)
        before = after = torch.zeros(())
        for x in rows(stream, group.root):
            before = before.to(x.device) + x.square().amax(-1).sum()
            after = after.to(x.device) + _rotated(x, matrix).square().amax(-1).sum()
        check_finite(before, f"input of {weight_label(stream.program, group.sites[0])}")
        gain = float(before) / max(float(after), 1e-30)
        if gain >= self.least_gain:
            return ""
        return f"a rotation would reduce its noise by a factor of {gain:.1f} only, and {self.least_gain:g} is required"


def _obstacle(program: Program, group: Group, matrix: Tensor) -> str:
    """Why the weights of a group cannot be turned, or ''."""
    if len(matrix) < _LEAST_BLOCK:
        columns = int(value_of(group.root).shape[-1])
        return f"no power of two of at least {_LEAST_BLOCK} divides its {columns} channels"
    return next(filter(None, (read_elsewhere(program, site, group.sites) for site in group.sites)), "")


def _turn(program: Program, sites: list[Linear], matrix: Tensor) -> None:
    """Edit `program`: a rotation in front of linears of one input, its inverse in their weights."""
    made: dict[Node, Node] = {}
    done: set[str] = set()
    for site in sites:
        assert site.placeholder is not None
        label = weight_label(program, site)
        if label not in done:
            done.add(label)
            _turn_weight(program, site, matrix)
        if site.input not in made:
            device = program.weight(weight_name(program, site)).device
            held = hadamard_weight(program, len(matrix), value_of(site.input).dtype, device)
            arguments = (site.input, held)
            made[site.input] = insert_call(program, site.node, torch.ops.optc.rotate_blocks.default, arguments)
        site.node.replace_input_with(site.input, made[site.input])


def _turn_weight(program: Program, site: Linear, matrix: Tensor) -> None:
    name = weight_name(program, site)
    old = program.weight(name).detach()
    # What the graph multiplies with is the matrix rounded to the program's type: a multiple of an orthogonal one.
    rounded = matrix.to(old.dtype).double()
    inverse = rounded / float((rounded[0] ** 2).sum())
    turned = _rotated(weight_rows(program, site).double(), inverse).to(old.dtype)
    turned = turned.t().contiguous() if site.transposed else turned.contiguous()
    if site.index is not None:
        whole = old.clone()
        whole[site.index] = turned
        turned = whole
    set_weight(program, name, turned)


def _rotated(x: Tensor, matrix: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, len(matrix)))
    return (blocks @ matrix.to(x.device, x.dtype)).flatten(-2)

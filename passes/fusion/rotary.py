"""x * cos(position * inv_freq) + rotate_half(x) * sin(...)  ->  optc.rotary(x, position, inv_freq)"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import (
    CASTS,
    COPIES,
    MOVES,
    Sizes,
    aten,
    evaluate,
    is_tensor,
    leaves,
    peel_casts,
    sole_user,
    truncates,
    value_of,
)
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.weights import as_weight, prune_contract

_ROTATE = MOVES | CASTS | COPIES | {aten.neg.default}
_TRIG = frozenset((aten.cos.default, aten.sin.default))
_ANGLE = _ROTATE | _TRIG | {aten.mul.Tensor, aten.mul.Scalar, aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True, kw_only=True)
class FuseRotary(Pass):
    """x * cos(a) + rotate_half(x) * sin(a), a = position * inv_freq  ->  optc.rotary(x, position, inv_freq)

    Read off dataflow: what is rotated, which positions and frequencies make the angles, the attention
    factor on cos and sin, paired halves or neighbours, and a rest of features that passes through.
    """

    name: ClassVar[str] = "fuse-rotary"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse in a clone of `program`."""
        result = apply_rules(program, [_Rotation()])
        edited = prune_contract(result.program) if result.matched else program
        return dataclasses.replace(result, program=edited)


@dataclass(frozen=True)
class _Angles:
    """What makes cos and sin. `position` int [B, S]; `inv_freq` a weight [R / 2]."""

    position: Node
    inv_freq: Node
    scaling: float


class _Rotation(Rule):
    """add(mul(x, cos), mul(rotated x, sin)), and the concatenation with the features that are not rotated."""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        parts = _parts(node)
        if parts is None:
            return None
        x, cos, sin = parts
        sizes = Sizes()
        angles = _angles(program, cos, sin, sizes)
        if isinstance(angles, str):
            return Miss(node.name, angles)
        if value_of(x).dim() != 4:
            return Miss(node.name, f"{x.name} has {value_of(x).dim()} axes, not [B, H, S, D]")
        style = _style(node, x, angles, sizes)
        if style is None:
            reason = "it does not rotate the feature pairs of [B, H, S, D] by position * inv_freq"
            return Miss(node.name, reason)
        return Match(node, {"x": x, "angles": angles, "interleaved": style})

    def rewrite(self, program: Program, match: Match) -> None:
        angles: _Angles = match.found["angles"]
        node, x = _with_rest(match.node, match.found["x"])
        dtype = value_of(match.node).dtype
        if value_of(x).dtype != dtype:
            x = insert_call(program, node, aten.to.dtype, (x, dtype))
        arguments = (x, angles.position, as_weight(program, angles.inv_freq, torch.float32, "float32"))
        knobs = {"scaling": angles.scaling, "interleaved": match.found["interleaved"]}
        replace_call(program, node, torch.ops.optc.rotary.default, arguments, knobs)


def _parts(node: Node) -> tuple[Node, Node, Node] | None:
    """x, cos and sin of a node that looks like a rotation, else None."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    products = [item for item in node.args[:2] if isinstance(item, Node) and item.target is aten.mul.Tensor]
    if len(products) < 2 or not all(is_tensor(item) for product in products for item in product.args):
        return None
    for plain, turned in permutations(products):
        for x, cos in permutations(plain.args):
            for rotated, sin in permutations(turned.args):
                assert isinstance(x, Node)
                assert isinstance(rotated, Node)
                assert isinstance(cos, Node)
                assert isinstance(sin, Node)
                for origin in (x, peel_casts(x)):
                    if _is_rotated(rotated, origin):
                        return origin, cos, sin
    return None


def _is_rotated(node: Node, x: Node) -> bool:
    """Whether `node` rearranges x and nothing else, with a sign changed somewhere."""
    negated = False

    def through(current: Node) -> bool:
        nonlocal negated
        negated |= current.target is aten.neg.default
        return current.target in _ROTATE and not truncates(current)

    return node is not x and leaves(node, through, frozenset((x,))) == [x] and negated


def _angles(program: Program, cos: Node, sin: Node, sizes: Sizes) -> _Angles | str:
    """Positions, frequencies and attention factor behind cos and sin, or why there are none."""
    seen: list[Node] = []

    def through(current: Node) -> bool:
        seen.append(current)
        return current.target in _ANGLE and not truncates(current)

    roots = list(dict.fromkeys(root for side in (cos, sin) for root in leaves(side, through)))
    if not _TRIG.issubset(node.target for node in seen):
        return f"its factors are not cos and sin but come from {_describe(program, roots)}"
    weights = [root for root in roots if program.weight_of(root) is not None and value_of(root).dim() == 1]
    positions = [root for root in roots if is_tensor(root) and not value_of(root).is_floating_point()]
    if len(roots) != 2 or len(weights) != 1 or len(positions) != 1 or value_of(positions[0]).dim() != 2:
        return f"its angles are not position [B, S] * inv_freq but come from {_describe(program, roots)}"
    zeros = torch.zeros(sizes.shape(positions[0]), dtype=torch.float64)
    ones = torch.ones(sizes.shape(weights[0]), dtype=torch.float64)
    factor: Tensor = evaluate(cos, {positions[0]: zeros, weights[0]: ones}, sizes)
    return _Angles(positions[0], weights[0], float(factor.flatten()[0]))


def _describe(program: Program, roots: list[Node]) -> str:
    return ", ".join(
        program.weight_of(root) or (root.name if root.op == "placeholder" else f"{root.name} ({root.target})")
        for root in roots
    )


def _style(node: Node, x: Node, angles: _Angles, sizes: Sizes) -> bool | None:
    """Whether pairs are neighbours (True) or halves (False); None when `node` is not `optc.rotary` of x.

    `node` is made of x, position and inv_freq by rearranging, multiplying, adding, cos and sin alone: an
    analytic expression. Two such expressions that agree at random real values are the same one (with
    probability 1), so that one evaluation decides, at sizes where every axis has its own length.
    """
    generator = torch.Generator().manual_seed(0)
    values = {
        item: torch.rand(sizes.shape(item), generator=generator, dtype=torch.float64)
        for item in (x, angles.position, angles.inv_freq)
    }
    if values[x].shape[-1] != 2 * values[angles.inv_freq].shape[0]:
        return None
    batch, length = values[angles.position].shape
    if batch not in (1, values[x].shape[0]) or length != values[x].shape[2]:
        return None  # [B, S, H, D], turned before heads and positions change places
    computed = evaluate(node, values, sizes)
    for interleaved in (False, True):
        expected = torch.ops.optc.rotary(*values.values(), scaling=angles.scaling, interleaved=interleaved)
        if computed.shape == expected.shape and torch.allclose(computed, expected, rtol=0.0, atol=1e-5):
            return interleaved
    return None


def _with_rest(node: Node, x: Node) -> tuple[Node, Node]:
    """Where untouched features are put behind the rotated ones: that concatenation and the tensor of both."""
    joined = sole_user(node)
    if joined is None or joined.target is not aten.cat.default or (*joined.args, 0)[1] not in (-1, 3):
        return node, x
    pieces: Any = joined.args[0]
    whole: Any = x.args[0] if x.target in MOVES | COPIES else None
    if not is_tensor(whole) or value_of(whole).dim() != 4 or len(pieces) != 2 or pieces[0] is not node:
        return node, x
    rest = pieces[1]
    if value_of(rest).dtype != value_of(node).dtype or value_of(joined).dtype != value_of(node).dtype:
        return node, x
    if leaves(rest, lambda current: current.target in MOVES | COPIES, frozenset((whole,))) != [whole]:
        return node, x
    sizes = Sizes()
    probe = torch.arange(torch.Size(sizes.shape(whole)).numel()).reshape(sizes.shape(whole))
    both = torch.cat([evaluate(piece, {whole: probe}, sizes) for piece in (x, rest)], -1)
    return (joined, whole) if torch.equal(both, probe) else (node, x)

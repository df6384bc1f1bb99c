"""x * rsqrt(mean(x^2, -1) + eps) * weight  ->  aten.rms_norm(x, [D], weight, eps)"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from optc.compiler.analysis.dataflow import (
    CASTS,
    aten,
    constant_roots,
    is_tensor,
    peel,
    peel_casts,
    scalar,
    sole_user,
    value_of,
)
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.weights import as_weight, prune_contract

_RMS_NORM = aten.rms_norm.default


@dataclass(frozen=True, kw_only=True)
class FuseNorm(Pass):
    """x * rsqrt(mean(x^2, -1) + eps) * weight  ->  aten.rms_norm(x, [D], weight, eps)

    RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) as models spell it out: in
    float32, rounded before or after the weight, or with a weight kept as an offset from 1, which is
    folded here. `aten.rms_norm` computes in float32 whatever its input and rounds once, at the end:
    in 16-bit types that differs from rounding before the weight by one unit in the last place.
    """

    name: ClassVar[str] = "fuse-norm"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse in a clone of `program`."""
        result = apply_rules(program, [_RootMeanSquare()])
        edited = prune_contract(result.program) if result.matched else program
        return dataclasses.replace(result, program=edited)


class _RootMeanSquare(Rule):
    """mul(x, rsqrt(...)) and the casts and the weight behind it."""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        factors = _factors(node)
        if factors is None:
            return None
        x, mean, eps = factors
        squared, axes, keep = (*mean.args, False)[:3]
        rank = value_of(x).dim()
        last = isinstance(axes, list | tuple) and [axis % rank for axis in axes] == [rank - 1]
        if not last or keep is not True:
            return Miss(node.name, f"the mean runs over axes {axes}, not over the last one, kept")
        if eps is None:
            return Miss(node.name, "eps is not a number")
        base = _squared(squared)
        if base is None:
            return Miss(node.name, "the mean is not a mean of squares")
        if peel_casts(base) is not peel_casts(x):
            return Miss(node.name, f"{x.name} is scaled by the mean square of {base.name}")
        if not isinstance(value_of(x).shape[-1], int):
            return Miss(node.name, "the size of the last axis is not fixed")
        end, weight = _extent(program, node, x)
        return Match(end, {"x": x, "eps": eps, "weight": weight})

    def rewrite(self, program: Program, match: Match) -> None:
        wide, weight = match.found["x"], match.found["weight"]
        source, out = peel_casts(wide), value_of(match.node).dtype
        scales = [] if weight is None else [peel(weight)]
        plain = all(program.weight_of(item) is not None and value_of(item).dtype == out for item in scales)
        # Straight from and to a 16-bit type where all agree; else in the type the model computes in.
        x = source if plain and value_of(source).dtype == out else peel(wide)
        kind = value_of(x).dtype
        scale = None if weight is None else as_weight(program, weight, kind, "folded")
        arguments = (x, [int(value_of(x).shape[-1])], scale, match.found["eps"])
        if kind == out:
            replace_call(program, match.node, _RMS_NORM, arguments)
        else:
            normed = insert_call(program, match.node, _RMS_NORM, arguments)
            replace_call(program, match.node, aten.to.dtype, (normed, out))


def _factors(node: Node) -> tuple[Node, Node, float | None] | None:
    """x, the mean and eps of `x * rsqrt(mean + eps)`, else None."""
    if node.target is not aten.mul.Tensor or not all(is_tensor(item) for item in node.args):
        return None
    left, right = node.args
    for x, root in ((left, right), (right, left)):
        assert isinstance(x, Node)
        assert isinstance(root, Node)
        inner = _rsqrt_argument(peel_casts(root))
        if inner is None or inner.target is not aten.add.Tensor or not isinstance(inner.args[0], Node):
            continue
        mean = peel(inner.args[0])
        if mean.target is aten.mean.dim:
            return x, mean, scalar(inner.args[1])
    return None


def _rsqrt_argument(node: Node) -> Node | None:
    """What `rsqrt(v)` or `v ** -0.5` is taken of."""
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5
    if node.target is not aten.rsqrt.default and not power:
        return None
    inner = node.args[0]
    return peel(inner) if isinstance(inner, Node) else None


def _squared(node: Any) -> Node | None:
    """What `v ** 2`, `v * v` or `square(v)` is taken of."""
    if not isinstance(node, Node):
        return None
    node = peel(node)
    base = node.args[0] if node.args else None
    square = (
        node.target is aten.square.default
        or (node.target is aten.pow.Tensor_Scalar and node.args[1] == 2)
        or (node.target is aten.mul.Tensor and base is node.args[1])
    )
    return base if square and isinstance(base, Node) else None


def _extent(program: Program, node: Node, x: Node) -> tuple[Node, Node | None]:
    """The last node of the norm and its weight: what follows `node` as long as nothing else reads between."""
    narrow, size = value_of(peel_casts(x)).dtype, value_of(x).shape[-1]
    last, weight, current = node, None, node
    while (user := sole_user(current)) is not None:
        if user.target in CASTS and user.args[0] is current:
            current = user
            # A cast is the norm's own when it returns to the input's type, or when the weight follows.
            if value_of(current).dtype == narrow:
                last = current
            if weight is not None:
                break
        elif weight is None and (other := _other_factor(user, current)) is not None:
            if tuple(value_of(other).shape) != (size,) or not constant_roots(program, other):
                break
            last, weight, current = user, other, user
        else:
            break
    return last, weight


def _other_factor(product: Node, factor: Node) -> Node | None:
    """The other tensor of a product, or None when `product` is no product of tensors."""
    if product.target is not aten.mul.Tensor or not all(is_tensor(item) for item in product.args):
        return None
    other = product.args[1] if product.args[0] is factor else product.args[0]
    return other if isinstance(other, Node) and other is not factor else None

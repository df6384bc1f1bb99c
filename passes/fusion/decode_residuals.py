"""Residuals for fuse-decode: what a result is added to, and norms and factors that stand between the two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import (
    CASTS,
    COPIES,
    VIEWS,
    aten,
    is_tensor,
    peel_casts,
    scalar,
    sole_user,
    value_of,
)
from optc.compiler.analysis.linears import linear_site
from optc.compiler.analysis.norms import norm_call
from optc.compiler.analysis.rows import forward, keeps_rows
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call, replace_node
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.passes.fusion.decode_rows import with_rank

_FUSED = torch.ops.optc.fused_norm.default
_ROWS = (2, 3)
"""Axes of [tokens, C] and [1, tokens, C]; norms of heads have more."""


def residual_behind(end: Node) -> tuple[Node, Node] | str | None:
    """The sum that a result is alone read by, and what it is added to; why these do not fit; None where there is none."""
    end = forward(end)
    add = sole_user(end)
    if add is None or add.target is not aten.add.Tensor or add.kwargs.get("alpha", 1) != 1:
        return None
    others = [item for item in add.args if item is not end]
    if len(others) != 1 or not is_tensor(others[0]):
        return None
    (other,) = others
    assert isinstance(other, Node)
    if value_of(other).shape != value_of(end).shape or value_of(other).dtype != value_of(end).dtype:
        return f"{other.name} is of another shape or type than what it is added to"
    return add, other


class Regroup(Rule):
    """(linear + linear) + x  ->  linear + (linear + x)

    Attention and MLP that read the same activations (GPT-NeoX) are added to each other first. Behind this, each of the
    two sums has a linear of its own to be taken into.
    """

    def match(self, program: Program, node: Node) -> Match | None:
        if node.target is not aten.add.Tensor or _made_by_linear(program, node.args[1]) is None:
            return None
        found = residual_behind(node) if _made_by_linear(program, node.args[0]) is not None else None
        if found is None or isinstance(found, str) or _made_by_linear(program, found[1]) is not None:
            return None
        return Match(found[0], {"sum": node, "residual": found[1]})

    def rewrite(self, program: Program, match: Match) -> None:
        one, other = match.found["sum"].args
        rank = value_of(match.node).dim()
        first = with_rank(program, match.node, one, rank)
        second = insert_call(
            program, match.node, aten.add.Tensor, (with_rank(program, match.node, other, rank), match.found["residual"])
        )
        replace_call(program, match.node, aten.add.Tensor, (first, second))


def _made_by_linear(program: Program, node: object) -> Node | None:
    """The linear whose very result a node shows, where nothing else reads it."""
    while isinstance(node, Node) and sole_user(node) is not None:
        if linear_site(program, node) is not None:
            return node
        if node.target not in COPIES | VIEWS or not keeps_rows(node):
            return None
        node = node.args[0]
    return None


@dataclass(frozen=True)
class _Site:
    """norm(x) * factor + residual.

    Attributes:
        end: the node whose value the call has, in x's type. weight, bias, kind, eps: of the norm; "" for none.
    """

    x: Node
    end: Node
    weight: Node | None = None
    bias: Node | None = None
    kind: str = ""
    eps: float = 0.0
    factor: float = 1.0
    residual: Node | None = None


class FusedNorm(Rule):
    """[residual +] [factor *] norm(x)  ->  optc.fused_norm, of norms and factors that no linear has taken in

    A norm behind a linear needs the whole row, of which the linear's programs have a part each.
    """

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        site = _normed(node) or _scaled(node)
        if isinstance(site, str):
            return Miss(node.name, f"it stays ATen: {site}")
        return None if site is None else Match(site.end, {"site": site})

    def rewrite(self, program: Program, match: Match) -> None:
        site: _Site = match.found["site"]
        x = with_rank(program, site.end, site.x, value_of(site.end).dim())
        options = {"norm": site.kind, "eps": site.eps, "factor": site.factor}
        fused = insert_call(program, site.end, _FUSED, (x, site.weight, site.bias, site.residual), options)
        replace_node(program, site.end, fused)


def _normed(node: Node) -> _Site | str | None:
    """A norm of rows and what follows; why it cannot be one call; None for other nodes."""
    norm = norm_call(node)
    if norm is None or value_of(node).dim() not in _ROWS:
        return None
    if norm.obstacle is not None or norm.eps is None:
        return norm.obstacle
    source, end = norm.x, node
    cast = sole_user(forward(node))
    if cast is not None and cast.target in CASTS and value_of(cast).dtype == value_of(peel_casts(source)).dtype:
        source, end = peel_casts(source), cast  # computed in float32, from and to a 16-bit type
    if value_of(source).dtype != value_of(end).dtype:
        return f"it reads {value_of(source).dtype} and makes {value_of(end).dtype}"
    return _followed(_Site(source, end, norm.weight, norm.bias, norm.kind, norm.eps))


def _scaled(node: Node) -> _Site | None:
    """A number times rows that are then added to others."""
    if node.target is not aten.mul.Tensor or value_of(node).dim() not in _ROWS:
        return None
    source, number = node.args
    if not is_tensor(source) or scalar(number) is None or not value_of(node).is_floating_point():
        return None
    assert isinstance(source, Node)
    site = _followed(_Site(source, source)) if value_of(source).dtype == value_of(node).dtype else None
    return site if site is not None and site.residual is not None else None


def _followed(site: _Site) -> _Site:
    """With the factor and the residual behind it, where nothing else reads what is between."""
    product = sole_user(forward(site.end))
    if product is not None and product.target is aten.mul.Tensor:
        number = scalar(product.args[1])
        if number is not None:
            site = replace(site, end=product, factor=number)
    found = residual_behind(site.end)
    return site if found is None or isinstance(found, str) else replace(site, end=found[0], residual=found[1])

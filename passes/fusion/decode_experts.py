"""The rules of fuse-decode for experts: their choice, and the sum over all of them, of which a token has chosen some."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, peel, peel_casts, readers, sole_user, value_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_node
from optc.compiler.rewriting.passes import Match, Rule
from optc.passes.fusion.decode_residuals import residual_behind
from optc.passes.fusion.decode_rows import with_rank

_LINEAR = torch.ops.optc.fused_linear.default
_FUSED = torch.ops.optc.fused_experts.default
_CHOOSE = torch.ops.optc.choose_experts.default


class ChooseExperts(Rule):
    """topk(softmax(logits)) [/ its sum]  ->  optc.choose_experts"""

    def match(self, program: Program, node: Node) -> Match | None:
        if node.target is not aten.topk.default or tuple(node.args[2:]) not in (
            (),
            (-1,),
            (-1, True),
            (-1, True, True),
        ):
            return None
        softmax, slots = node.args[:2]
        assert isinstance(softmax, Node)
        if softmax.target is not aten.softmax.int or softmax.args[1] not in (-1, 1) or not isinstance(slots, int):
            return None
        logits = softmax.args[0]
        assert isinstance(logits, Node)
        results = {int(str(item.args[1])): item for item in node.users if item.target is operator.getitem}
        if value_of(softmax).dim() != 2 or value_of(softmax).dtype != torch.float32 or len(results) != 2:
            return None
        quotient = _over_its_sum(results[0])
        found = {"logits": peel_casts(logits), "weights": quotient or results[0], "indices": results[1]}
        return Match(node, {**found, "options": {"slots": slots, "normalized": quotient is not None}})

    def rewrite(self, program: Program, match: Match) -> None:
        call = insert_call(program, match.node, _CHOOSE, (match.found["logits"],), match.found["options"])
        for place, name in enumerate(("weights", "indices")):
            replace_node(program, match.found[name], insert_call(program, match.node, operator.getitem, (call, place)))


def _over_its_sum(values: Node) -> Node | None:
    """values / sum(values, -1, keepdim), where nothing else reads the values."""
    users = readers(values)
    if len(users) != 2 or users[0].target is not aten.sum.dim_IntList or list(users[0].args[1:]) != [[-1], True]:
        return None
    total, quotient = users
    divides = quotient.target in (aten.div.Tensor, aten.div_.Tensor) and quotient.args == (values, total)
    return quotient if divides and sole_user(total) is quotient else None


@dataclass(frozen=True)
class Expert:
    """share * (down[index] @ act(up[index] @ x)), where the share is the weight with which a token chose it, or 0.

    Attributes:
        up, down: weights of all experts, [E, N, K] and [E, C, H]. options: of the first product: its activation.
        indices, weights: [tokens, S], the experts of each token.
    """

    index: int = field(compare=False)
    x: Node
    up: Node
    down: Node
    options: tuple[tuple[str, Any], ...]
    indices: Node
    weights: Node


class FusedExperts(Rule):
    """0 + share_0 * down_0(act(up_0(x))) + share_1 * ... [+ residual]  ->  optc.fused_experts, behind FusedLinear

    Attributes:
        taken: fused linears that went into the calls.
    """

    def __init__(self) -> None:
        self.taken = 0

    def match(self, program: Program, node: Node) -> Match | None:
        experts = summed_experts(program, node, _fused_products)
        if not experts:
            return None
        found = residual_behind(node)
        end, residual = (node, None) if found is None or isinstance(found, str) else found
        return Match(end, {"expert": experts[0], "count": len(experts), "residual": residual})

    def rewrite(self, program: Program, match: Match) -> None:
        expert: Expert = match.found["expert"]
        residual, end = match.found["residual"], match.node
        others = (expert.indices, expert.weights, residual and with_rank(program, end, residual, 2))
        fused = insert_call(program, end, _FUSED, (expert.x, expert.up, expert.down, *others), dict(expert.options))
        replace_node(program, end, with_rank(program, end, fused, value_of(end).dim()))
        self.taken += 2 * match.found["count"]


Products = tuple[int, Node, Node, Node, dict[str, Any]]
"""Of one expert: its number, x, the stacks of its two weights, and the options of what stands between them."""
ReadProducts = Callable[[Program, Node], Products | None]
"""Reads the products of an expert off the last of them."""


def summed_experts(program: Program, node: Node, read: ReadProducts) -> list[Expert]:
    """All experts of two stacks of weights, in order, where `node` is the whole sum over them; else none."""
    experts = _terms(program, node, read)
    if not experts or value_of(experts[0].up).shape[0] != len(experts) or len(set(experts)) != 1:
        return []
    return experts if [item.index for item in experts] == list(range(len(experts))) else []


def _terms(program: Program, node: Node, read: ReadProducts) -> list[Expert]:
    """The terms of a sum that begins with zeros, in their order; none where the sum goes on."""
    if node.target is not aten.add.Tensor or _continues(program, node, read):
        return []
    found: list[Expert] = []
    while node.target is aten.add.Tensor:
        before, term = node.args[:2]
        expert = _expert(program, term, read)
        if expert is None or not isinstance(before, Node):
            return []
        found.insert(0, expert)
        node = before
    return found if node.target is aten.zeros_like.default else []


def _continues(program: Program, node: Node, read: ReadProducts) -> bool:
    """Whether another expert is added to a sum."""
    user = sole_user(node)
    return user is not None and user.target is aten.add.Tensor and _expert(program, user.args[1], read) is not None


def _expert(program: Program, term: object, read: ReadProducts) -> Expert | None:
    if not isinstance(term, Node) or term.target is not aten.mul.Tensor:
        return None
    product, share = term.args
    if not isinstance(product, Node) or not isinstance(share, Node):
        return None
    products, choice = read(program, peel(product)), _choice(share)
    if products is None or choice is None or products[0] != choice[0] or value_of(products[1]).dim() != 2:
        return None
    index, x, up, down, options = products
    return Expert(index, x, up, down, tuple(sorted(options.items())), choice[1], choice[2])


def _fused_products(program: Program, product: Node) -> Products | None:
    down = _of_stack(program, product)
    if down is None or dict(product.kwargs):
        return None
    hidden = product.args[0]
    assert isinstance(hidden, Node)
    hidden = peel(hidden)
    up = _of_stack(program, hidden)
    if up is None or not set(hidden.kwargs) <= {"activation", "gated"} or up[1] != down[1]:
        return None
    x = hidden.args[0]
    return (up[1], peel(x), up[0], down[0], dict(hidden.kwargs)) if isinstance(x, Node) else None


def _of_stack(program: Program, linear: Node) -> tuple[Node, int] | None:
    """The weight [E, N, K] and the place in it of a fused linear that has nothing but its product and activation."""
    if linear.target is not _LINEAR or any(item is not None for item in linear.args[2:]):
        return None
    return stacked(program, linear.args[1])


def stacked(program: Program, chosen: object) -> tuple[Node, int] | None:
    """The weight [E, N, K] that a matrix is a part of, and its place."""
    if not isinstance(chosen, Node) or chosen.target is not aten.select.int or chosen.args[1] != 0:
        return None
    stack, index = chosen.args[0], chosen.args[2]
    if not isinstance(stack, Node) or not isinstance(index, int) or program.weight_of(stack) is None:
        return None
    return stack, index


def _choice(share: Node) -> tuple[int, Node, Node] | None:
    """e, indices and weights of sum(where(indices == e, weights, 0), -1, keepdim)."""
    total = peel_casts(share)
    if total.target is not aten.sum.dim_IntList or list(total.args[1:]) != [[-1], True]:
        return None
    where = total.args[0]
    if not isinstance(where, Node) or where.target is not aten.where.ScalarOther or where.args[2] != 0:
        return None
    condition, weights = where.args[:2]
    if not isinstance(condition, Node) or condition.target is not aten.eq.Scalar or not isinstance(weights, Node):
        return None
    indices, index = condition.args
    return (index, indices, weights) if isinstance(indices, Node) and isinstance(index, int) else None
